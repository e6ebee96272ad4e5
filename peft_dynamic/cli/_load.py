"""Loading a model for a task."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_hosts_warnings() -> Iterator[None]:
    """Hide what transformers says about a property of its own that PEFT still reads: no user can mend it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def auto_class(task_type: str | None) -> Any:
    """The transformers class for PEFT's name of a task."""
    import transformers

    from peft_dynamic.hub import AUTO_CLASSES

    return getattr(transformers, AUTO_CLASSES.get(str(getattr(task_type, "value", task_type)), "AutoModel"))


def fast_dtype() -> Any:
    """The dtype for training the adapter: bfloat16 where the machine computes it faster than float32.

    On a CPU that is measured, since it varies a lot: some processors have matrix units for bfloat16, others emulate it.
    """
    import time

    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        a @ b  # the first call sets things up
        times = []
        for _ in range(3):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return min(seconds, key=lambda dtype: seconds[dtype])
