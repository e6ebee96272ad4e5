"""The one training loop of the studies."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class Step:
    loss: float
    seconds: float


def adamw(parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Without weight decay, of the parameters that are trained."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=lr, weight_decay=0.0)


def descended(loss: torch.Tensor) -> float:
    """Run the backward pass."""
    loss.backward()
    return loss.item()


def fit(
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler | None,
    batches: Iterable[Any],
    backward: Callable[[Any], float],
    clip: float | None = 1.0,
    say: Callable[[int, float], None] | None = None,
) -> list[Step]:
    """A step for each of the batches, of which `backward` makes the gradients and returns the loss."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    steps: list[Step] = []
    for batch in batches:
        start = time.perf_counter()
        loss = backward(batch)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
        steps.append(Step(loss, time.perf_counter() - start))
        if say is not None:
            say(len(steps), loss)
    return steps
