"""Labels that the teacher takes for wrong: `label_noise`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from peft_dynamic.functional.distill import IGNORED, label_loss

KINDS = ("drop", "relabel")


class LabelNoise:
    """Suspects the rows whose labels the teacher finds the least likely of all training rows.

    A bound on the teacher's loss divides them, so that it does not matter which rows are in a batch, a part of a step
    or a process. Of rows with equal losses at the bound none is suspected.

    Args:
        kind: "drop" or "relabel".
        rate: the share of the labelled rows that are suspected, rounded down to a whole row.
    """

    def __init__(self, kind: str, rate: float) -> None:
        self.kind, self.rate = kind, rate
        self.bound: float | None = None

    def look(self, losses: list[torch.Tensor]) -> None:
        """Take the bound from the teacher's losses on this process's part of the training rows.

        Raises:
            ValueError: the rate is less than a row.
        """
        each = torch.cat(losses).double().tolist() if losses else []
        if dist.is_available() and dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, each)
            each = [loss for part in parts for loss in part]
        found = sorted(each, reverse=True)
        count = math.floor(self.rate * len(found) + 1e-9)
        if not 0 < count < len(found):
            raise ValueError(
                f"noise_rate={self.rate} of {len(found)} rows with a label is {count} rows: at least one must be "
                "suspected, and one be left. Set another rate, or leave label_noise out."
            )
        # midway, as a row's loss differs in its last digits with the rows that it is padded with
        self.bound = (found[count - 1] + found[count]) / 2

    def cleaned(self, labels: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The labels to train on, and which rows are suspected.

        Args:
            labels: (N,) int64, -100 for a row without a label.
            teacher: (N, K) logits.

        Raises:
            ValueError: no bound has been taken.
        """
        if self.bound is None:
            raise ValueError(
                f"label_noise={self.kind!r}: the training rows have not been looked at. In a loop of your own call "
                "distiller.look(batches) before the first step."
            )
        suspected = (label_loss(teacher, labels).double() > self.bound) & (labels != IGNORED)
        better = teacher.argmax(1) if self.kind == "relabel" else torch.full_like(labels, IGNORED)
        return torch.where(suspected, better, labels), suspected
