"""The order of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class RolloutSampler(Sampler[int]):
    """Indices in runs of one rollout over all processes, each run repeated for every micro-batch that is trained on it.

    Trainer counts the micro-batches of a data loader. A rollout gives many of them from one batch of prompts, so the
    indices are repeated here, where skipping to a checkpoint's place still works. The last rollout of an epoch is
    filled up with prompts from the epoch's beginning: nothing has to divide, and no prompt is left out.

    Args:
        rows: number of prompts.
        rollout: prompts of one rollout.
        repeats: how often each run is given out.
        seed: of the order, or None for the order of the dataset.
        epoch: tells the current epoch. Asked, not set: on resume accelerate's `set_epoch` does not get through to here.
    """

    def __init__(self, rows: int, rollout: int, repeats: int, seed: int | None, epoch: Callable[[], int]) -> None:
        self.rows, self.rollout, self.repeats, self.seed, self.epoch = rows, rollout, repeats, seed, epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.rows))
        if self.seed is not None:
            # A large odd factor, so that epoch 1 of seed 0 is not epoch 0 of seed 1
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch())
            order = torch.randperm(self.rows, generator=generator).tolist()
        for start in range(0, self.rows, self.rollout):
            run = [order[(start + i) % self.rows] for i in range(self.rollout)]
            for _ in range(self.repeats):
                yield from run

    def __len__(self) -> int:
        return -(-self.rows // self.rollout) * self.rollout * self.repeats
