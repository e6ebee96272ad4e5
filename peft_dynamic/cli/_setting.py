"""What a row of a measurement is measured at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """The base model, a rank of all modules, or a budget that they share."""

    rank: int | None = None
    budget: int | float | None = None

    def __str__(self) -> str:
        if self.budget is not None:
            share = isinstance(self.budget, float)
            return f"budget {self.budget:g}" if share else f"budget {self.budget:,}"
        return "base model" if self.rank is None else f"rank {self.rank}"

    @property
    def order(self) -> tuple[int, float]:
        """The base model, the ranks, the shares, the counts."""
        kind = 1 if self.budget is None else 2 if isinstance(self.budget, float) else 3
        return (0, 0) if self.budget is self.rank is None else (kind, self.rank or self.budget or 0)
