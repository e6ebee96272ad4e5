"""A curve as a small SVG picture with one point marked, drawn without matplotlib."""

from __future__ import annotations

import math
from html import escape

from peft_dynamic.ranks import RankCurve, RankRow
from peft_dynamic.reports.curve import number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 240, 60, 20, 20, 40


def curve_svg(curve: RankCurve, metric: str, marked: int) -> str:
    """A metric over the ranks, on a scale of powers of two; the base model's value is a dashed line.

    Args:
        curve: of ranks.
        metric: which to draw.
        marked: the rank whose point is marked, or between whose neighbours a line stands where it was not measured.
    """
    base, rows = _rows(curve, metric)
    if not rows:
        return ""
    values = [row.metrics[metric] for row in [*base, *rows]]
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    ranks = [row.rank or 1 for row in rows]
    most = math.log2(max(2, *ranks, marked))

    def x(rank: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(rank) / most

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / spread

    points = [(x(rank), y(row.metrics[metric])) for rank, row in zip(ranks, rows, strict=True)]
    parts = [_line(LEFT, y(row.metrics[metric]), WIDTH - RIGHT, "5 4") for row in base]
    parts += [_text(WIDTH - RIGHT, y(row.metrics[metric]) - 5, "base model", "end") for row in base]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="2"/>')
    parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="currentColor"/>' for px, py in points]
    parts += [_text(x(rank), HEIGHT - 20, str(rank), "middle") for rank in ranks]
    parts += [_text(LEFT - 6, y(value) + 4, number(value), "end") for value in dict.fromkeys((low, high))]
    parts.append(_text(WIDTH / 2, HEIGHT - 4, f"rank; {metric} on the left", "middle"))
    if marked in ranks:
        value = rows[ranks.index(marked)].metrics[metric]
        parts.append(_mark(x(marked), y(value)))
        said = f"rank {marked}: {metric} {number(value)}"
    else:
        parts.append(
            f'<line class="marked" x1="{x(marked):.1f}" x2="{x(marked):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
            'stroke="#d2691e" stroke-width="2"/>'
        )
        said = f"rank {marked} was not measured"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" style="max-width:{WIDTH}px;width:100%">'
        f"<title>{escape(said)}</title>{''.join(parts)}</svg><p>{escape(said)}</p>"
    )


def _rows(curve: RankCurve, metric: str) -> tuple[list[RankRow], list[RankRow]]:
    """The base model's rows and those of ranks, that have a value."""
    there = [row for row in curve.rows if math.isfinite(row.metrics.get(metric, math.nan))]
    return [row for row in there if row.is_base], [row for row in there if row.rank]


def _line(x1: float, y: float, x2: float, dashes: str) -> str:
    return (
        f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
        f'stroke-dasharray="{dashes}" opacity="0.6"/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12" fill="currentColor">{escape(text)}</text>'
    )


def _mark(x: float, y: float) -> str:
    return f'<circle class="marked" cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="#d2691e" stroke-width="3"/>'
