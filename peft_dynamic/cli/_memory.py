"""The most memory that a block of code needed, of the accelerator or else of this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Peak:
    """What `watched` found: bytes, or None where it cannot be told."""

    bytes: int | None = None


@contextmanager
def watched() -> Iterator[Peak]:
    """The peak of the block is known after it: on CUDA what torch allocated, on Linux the process's resident memory."""
    peak = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
        known = True
    except OSError:
        known = False
    yield peak
    peak.bytes = _resident() if known else None


def _resident() -> int | None:
    """The peak of the process's resident memory."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        return None
