"""The rows with which accelerate fills up the last batch of several processes: they are others' rows, seen twice."""

from __future__ import annotations

from typing import Any

import torch


def real_rows(accelerator: Any, batch_size: int, labels: torch.Tensor) -> torch.Tensor | None:
    """Which rows of this process's evaluation batch are its own; None where all are.

    Args:
        accelerator: accelerate's.
        batch_size: rows per process.
        labels: (rows, ...) of the batch.
    """
    loader = accelerator.gradient_state
    filled = accelerator.num_processes > 1 and loader.end_of_dataloader and loader.remainder > 0
    if not filled or len(labels) != batch_size:  # one row, without padding, holds several examples
        return None
    real = min(max(loader.remainder - accelerator.process_index * batch_size, 0), batch_size)
    return torch.arange(batch_size, device=labels.device) < real
