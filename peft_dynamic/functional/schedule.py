"""A number that moves with the progress of training: temperatures, weights, scales.

Progress is optimizer steps done over all steps, from 0 to 1. So a schedule has no epochs to round, and a resumed run
goes on where it was. The same text stands in Python, in YAML and on a command line.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from peft_dynamic.rules import is_finite, is_number

_FORMS = "a number such as 0.5, knots such as '0:0.1 1:1', or stairs such as 'steps 0:0 0.78:1'"


@dataclass(frozen=True)
class Schedule:
    """A value for each progress: lines between knots, or stairs that step at them.

    Before the first knot and after the last one the value is that knot's.

    Args:
        knots: (progress, value) pairs; progress increases, from 0 to 1.
        stairs: keep each knot's value until the next knot, in place of a line between them.

    Raises:
        ValueError: no knots, progress that does not increase or leaves 0 to 1, or a value that is not finite.
    """

    knots: tuple[tuple[float, float], ...]
    stairs: bool = False

    def __post_init__(self) -> None:
        places = [at for at, _ in self.knots]
        rising = all(before < after for before, after in pairwise(places))
        finite = all(is_finite(number) for knot in self.knots for number in knot)
        if not self.knots or not finite or not rising or not 0 <= min(places) <= max(places) <= 1:
            raise ValueError(
                f"schedule {self.knots!r}: the progress of the knots must increase from 0 to 1, with finite values."
            )

    @classmethod
    def parse(cls, value: Schedule | float | str | None) -> Schedule:
        """A schedule out of a number (which stays what it is), a text, or a schedule.

        `"0:0.1 1:1"` goes from 0.1 to 1 in a line; `"steps 0:0 0.78:1"` is 0, and 1 from progress 0.78 on.

        Raises:
            ValueError: the value is none of these.
        """
        if isinstance(value, Schedule):
            return value
        if value is not None and is_number(value):
            return cls(((0.0, float(value)),))
        if isinstance(value, str):
            first, *rest = value.split() or [""]
            stairs = first == "steps"
            words = rest if stairs else [first, *rest]
            try:
                if len(words) == 1 and ":" not in words[0] and not stairs:
                    return cls(((0.0, float(words[0])),))
                pairs = [word.split(":") for word in words]
                return cls(tuple((float(at), float(number)) for at, number in pairs), stairs)
            except ValueError as error:
                raise ValueError(f"schedule {value!r}: must be {_FORMS}; progress increases from 0 to 1.") from error
        raise ValueError(f"schedule {value!r}: must be {_FORMS}.")

    def __call__(self, progress: float) -> float:
        """The value at a progress.

        Args:
            progress: steps done over all steps, 0 to 1.

        Raises:
            ValueError: the progress is out of its range.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress={progress!r}: must be from 0 to 1, steps done over all steps.")
        after = bisect_right([at for at, _ in self.knots], progress)
        if after == 0:
            return self.knots[0][1]
        start, low = self.knots[after - 1]
        if after == len(self.knots) or self.stairs:
            return low
        end, high = self.knots[after]
        share = (progress - start) / (end - start)
        return low * (1 - share) + high * share  # their difference may be more than a float holds

    @property
    def values(self) -> tuple[float, ...]:
        """The knots' values: all values of the schedule lie between the least and the greatest of them."""
        return tuple(value for _, value in self.knots)

    @property
    def constant(self) -> bool:
        """Whether it never moves."""
        return len(set(self.values)) == 1

    def __str__(self) -> str:
        """The text that `parse` reads back, to the bit."""
        if len(self.knots) == 1:
            return repr(self.knots[0][1])
        words = [f"{at!r}:{value!r}" for at, value in self.knots]
        return " ".join(["steps", *words] if self.stairs else words)


def stairs(*knots: tuple[float, float]) -> str:
    """The text of stairs, for the presets; a knot at a progress that is there already replaces it."""
    kept = {at: value for at, value in knots if math.isfinite(at)}
    return str(Schedule(tuple(sorted(kept.items())), stairs=True)) if len(kept) > 1 else repr(float(knots[0][1]))


def moving(name: str, value: Schedule | float | str | None, rule: str, holds: Callable[[float], bool]) -> float | str:
    """A setting that moves, checked at each progress: its text, or a number where it does not move.

    Raises:
        ValueError: it is no schedule, or breaks the rule somewhere; the message has its name.
    """
    try:
        schedule = Schedule.parse(value)
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: {error}") from error
    if not all(map(holds, schedule.values)):
        raise ValueError(f"{name}={value!r}: must be {rule}, at each progress.")
    return schedule.values[0] if schedule.constant else str(schedule)


def progress_of(done: int, steps: int) -> float:
    """Steps done over all steps; 1 outside a training, which has no steps: schedules are at their end there."""
    return min(1.0, done / steps) if steps > 0 else 1.0
