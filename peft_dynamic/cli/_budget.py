"""One budget of time for a whole run: what fits in is decided beforehand, and again where a machine slows down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

# What is planned fills this much of the time that is left. The rest is for a machine that slows down.
FILL = 0.85
# The least part of it for measuring, and the fewest held-out rows, where not all of them fit in
MEASURE, FEWEST_ROWS = 0.3, 16


class Budget:
    """Time from the start of the command on.

    Args:
        minutes: how long the whole command may take; None for as long as it takes.
        started: when it started, by `clock`.
        clock: seconds that only grow.
    """

    def __init__(self, minutes: float | None, started: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.started = clock, started
        self.seconds = math.inf if minutes is None else 60 * minutes

    @property
    def limited(self) -> bool:
        """Whether there is an end."""
        return math.isfinite(self.seconds)

    def used(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    def left(self) -> float:
        """Seconds to the end; below 0 after it."""
        return self.seconds - self.used()


@dataclass
class Plan:
    """What fits in: optimizer steps, held-out rows, and when the training has to end by the clock."""

    steps: int
    rows: int
    train_by: float = math.inf


def plan(
    budget: Budget, step: float, row: float, levels: int, steps: int, rows: int, reserve: float, done: int = 0
) -> Plan:
    """The steps and held-out rows that fit in what is left of a budget.

    Args:
        budget: the time for all.
        step: seconds of one optimizer step.
        row: seconds of one held-out row, at one rank.
        levels: how often each held-out row is measured: once per rank, and once for the base model.
        steps: the steps that are wanted.
        rows: the held-out rows that there are.
        reserve: seconds to keep for what comes after: plot, export, check, samples.
        done: steps that a resumed run has behind it.
    """
    usable = FILL * max(0.0, budget.left() - reserve)
    for_all_steps, for_all_rows = step * (steps - done), row * levels * rows
    if for_all_steps + for_all_rows > usable:
        measuring = min(for_all_rows, max(MEASURE * usable, usable - for_all_steps))
        rows = max(min(rows, FEWEST_ROWS), min(rows, int(measuring / (row * levels))))
        training = max(0.0, usable - row * levels * rows)
        steps = done + min(steps - done, max(1, int(training / step)))
    # what the margin leaves goes to both alike
    return Plan(steps, rows, budget.clock() + max(0.0, budget.left() - reserve - row * levels * rows / FILL))


class Schedule:
    """The learning rate's factor at each step: a linear rise, then a cosine that ends where the training ends.

    A checkpoint keeps what stands in its `__dict__`, as `LambdaLR` does with any callable object.
    """

    def __init__(self, steps: int) -> None:
        self.rise = max(1, steps // 20)
        self.at, self.progress, self.end = self.rise, 0.0, steps

    def __call__(self, step: int) -> float:
        if step < self.rise:
            return step / self.rise
        return max(0.0, 0.5 * (1 + math.cos(math.pi * self._progress(step))))

    def _progress(self, step: int) -> float:
        """Of the cosine, from 0 to 1."""
        return min(1.0, self.progress + (1 - self.progress) * (step - self.at) / max(1, self.end - self.at))

    def move_end(self, step: int, end: int) -> None:
        """From `step` on the rate falls to reach 0 at another `end`; at `step` it is what it was."""
        if step > self.rise:
            self.progress, self.at = self._progress(step), step
        self.end = end


class Pace(TrainerCallback):
    """Ends the training in time, or where someone asks for it, with a checkpoint.

    Where the steps that are left do not fit in by the pace of the last ones there will be fewer, and the learning
    rate's schedule ends with them.
    """

    def __init__(
        self,
        schedule: Schedule,
        by: float,
        clock: Callable[[], float],
        stop: Callable[[], bool],
        say: Callable[[str], object],
    ) -> None:
        self.schedule, self.by, self.clock, self.stop, self.say = schedule, by, clock, stop, say
        self.times: list[float] = []
        self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = self.clock()
        if self.schedule.end != state.max_steps:  # a resumed run whose time, or what is left of it, is another
            self.schedule.move_end(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.clock()
        self.times = [*self.times[-4:], now - self.last]
        self.last = now
        ahead = state.max_steps - state.global_step
        pace = sum(self.times) / len(self.times)
        if ahead > 0 and now + ahead * pace > self.by:
            end = state.global_step + max(0, int((self.by - now) / pace) if pace else ahead)
            self.schedule.move_end(state.global_step, end)
            state.max_steps = end
        if self.stop() or state.global_step >= state.max_steps:
            control.should_training_stop = True
            control.should_save = True  # what a later --resume goes on from

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.say(f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.4g}")
