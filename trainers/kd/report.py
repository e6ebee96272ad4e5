"""What a distillation logs: means over the rows of all batches and processes since the last log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Sums:
    """Sums and counts by name."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[float, float]] = {}

    def add(self, accelerator: Any, sums: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> None:
        """Add a batch of every process."""
        if not sums:
            return
        names = sorted(sums)
        pairs = torch.stack([torch.stack([sums[name], sums[name].new_tensor(counts[name])]) for name in names])
        if accelerator.num_processes > 1:
            # Not gather_for_metrics: it would take the last batch's sums for rows, and drop some
            pairs = accelerator.gather(pairs[None]).sum(0)
        for name, (total, count) in zip(names, pairs.tolist(), strict=True):
            before = self.totals.get(name, (0.0, 0.0))
            self.totals[name] = (before[0] + total, before[1] + count)

    def take(self) -> dict[str, float]:
        """The means, and begin anew."""
        means = {name: total / count for name, (total, count) in self.totals.items() if count}
        self.totals = {}
        return means
