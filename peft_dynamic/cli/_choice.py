"""Which rank or budget of a curve to keep, and why, as sentences."""

from __future__ import annotations

import math
import warnings
from statistics import stdev

from peft_dynamic.cli._record import Setting
from peft_dynamic.ranks import RankCurve, RankRow
from peft_dynamic.reports.curve import direction, number


def choice(curve: RankCurve, metric: str, tolerance: float) -> tuple[RankRow | None, str]:
    """What `recommend` chooses, and why; None where no gain over the base model shows in the rows.

    Args:
        curve: with a rank or a budget at least.
        metric: to choose by.
        tolerance: how much of the best one's gain may be lost.
    """
    sign = 1 if direction(metric) else -1
    rows = [row for row in curve.rows if row.rank is not None] or [row for row in curve.rows if not row.is_base]
    finite = [row for row in rows if math.isfinite(row.metrics.get(metric, math.nan))]
    if not finite:
        return None, f"Nothing is recommended: the {metric} is finite nowhere."
    best = max(finite, key=lambda row: (sign * row.metrics[metric], -(row.rank or row.parameters or 0)))
    bases = (row for row in curve.rows if row.is_base and math.isfinite(row.metrics.get(metric, math.nan)))
    base = next(bases, None)
    if base is not None and not _learnt(best, base, metric, sign):
        return None, (
            f"Nothing was learnt that these rows show. Of the best, {_named(best)}, {_level(best, base, metric)}. That "
            "is no gain of more than twice its standard error. None is recommended."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a base model that is better, which is told above
        row = curve.recommended_row(tolerance, metric)
    why = f"{_level(row, base, metric)}, {_why(row, best, base, metric, tolerance)}"
    return row, f"Recommended: {_named(row)}. Here {why}."


def _why(row: RankRow, best: RankRow, base: RankRow | None, metric: str, tolerance: float) -> str:
    if row == best:
        return "the best of all" if base is None else "the greatest gain"
    top = f"{_named(best)}, the best with {number(best.metrics[metric])}"
    lost = abs(best.metrics[metric] - row.metrics[metric])
    whole = abs(best.metrics[metric] - (base.metrics[metric] if base else 0))
    if lost > tolerance * whole:
        return f"behind {top}, by no more than one standard error over these rows"
    if base is None:
        return f"within {100 * lost / whole if whole else 0:.1f} % of {top}"
    return f"{100 * (1 - lost / whole):.1f} % of the gain of {top}"


def _named(row: RankRow) -> str:
    return str(Setting(row.rank, row.budget))


def _error(row: RankRow, base: RankRow, metric: str) -> float:
    """The standard error of a gain over the rows; NaN where it is not known."""
    pairs = list(zip(row.samples.get(metric, []), base.samples.get(metric, []), strict=False))
    return stdev(a - b for a, b in pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan


def _learnt(row: RankRow, base: RankRow, metric: str, sign: int) -> bool:
    """By the rule of `train`: the gain is above 0 by more than twice its standard error."""
    gain, error = sign * (row.metrics[metric] - base.metrics[metric]), _error(row, base, metric)
    return gain > (0 if math.isnan(error) else 2 * error)


def _level(row: RankRow, base: RankRow | None, metric: str) -> str:
    said = f"the {metric} is {number(row.metrics[metric])}"
    if base is None:
        return said
    difference, error = row.metrics[metric] - base.metrics[metric], _error(row, base, metric)
    spread = "" if math.isnan(error) else f" ± {error:.3g}"
    return f"{said}, {abs(difference):.3g}{spread} {'above' if difference > 0 else 'below'} the base model's"
