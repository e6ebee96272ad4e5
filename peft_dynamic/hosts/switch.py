"""Another model inside a PeftModel: its adapter off, or another adapter on, for a while.

What is trained is afterwards what it was; a check tells whether the other model stays the same while the adapter is
trained, which adapters that change the base model's own weights do not grant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peft_dynamic.hosts.deepspeed import gathering
from peft_dynamic.hosts.modes import evaluating


@contextmanager
def switched(model: Any, adapter: str | None) -> Iterator[None]:
    """Inside the block a PeftModel is its base model, or has `adapter` on instead of the active one."""
    if adapter is None:
        with model.disable_adapter():
            yield
        return
    trained = [(p, p.requires_grad) for p in model.parameters()]  # set_adapter changes what is trained
    active = model.active_adapter
    model.set_adapter(adapter)
    try:
        yield
    finally:
        model.set_adapter(active)
        for p, trains in trained:
            p.requires_grad_(trains)


def depends_on_trained(model: Any, adapter: str | None, probe: Callable[[], torch.Tensor]) -> bool:
    """Whether the switched model computes anything else once every trained weight has moved.

    Args:
        model: a `PeftModel`.
        adapter: as in `switched`.
        probe: runs the model on something and returns its logits.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = [p.detach().clone() for p in trained]
    with evaluating(model), gathering(model):
        try:
            with switched(model, adapter):
                before = probe()
            for p in trained:
                p += 0.5
            with switched(model, adapter):
                after = probe()
        finally:
            for p, old in zip(trained, saved, strict=True):
                p.copy_(old)
    return not torch.equal(before, after)
