"""The statistics and tables of the reports: mean and spread, paired differences with their interval, Borda ranks."""

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from scipy.stats import rankdata, ttest_1samp


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean and sample standard deviation, which one value has not."""
    values = list(values)
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "seeds": len(values)}


def paired(own: dict[int, float], base: dict[int, float]) -> dict[str, Any] | None:
    """Own less base of the seeds that both have, with the 95 % interval of Student's t for its mean."""
    differences = [own[seed] - base[seed] for seed in own if seed in base]
    if not differences:
        return None
    result = spread(differences)
    if len(differences) > 1:
        interval = ttest_1samp(differences, 0).confidence_interval(0.95)
        result["interval_95"] = [float(interval.low), float(interval.high)]
    return result


def borda(scores: dict[str, dict[str, float]], higher: bool = True) -> dict[str, dict[str, float]]:
    """Of scores by task and method: each method's points and its rank by them, 1 for the most.

    On each task a method gets a point for each that it beats and half a one for each that it equals. Only the methods
    that all tasks have take part. Unlike means, ranks do not depend on the tasks' units.
    """
    first, *others = scores.values()
    methods = [method for method in first if all(method in task for task in others)]
    points = dict.fromkeys(methods, 0.0)
    for task in scores.values():
        ranks = rankdata([task[method] if higher else -task[method] for method in methods])  # 1 for the worst
        for method, rank in zip(methods, ranks, strict=True):
            points[method] += float(rank) - 1
    placed = rankdata([-points[method] for method in methods])
    return {
        method: {"points": points[method], "rank": float(place)} for method, place in zip(methods, placed, strict=True)
    }


def shown(cell: dict[str, Any] | None, digits: int = 1, unit: float = 1, sign: str = "") -> str:
    """`mean ± std`, or the mean alone."""
    if cell is None:
        return ""
    text = f"{unit * cell['mean']:{sign}.{digits}f}"
    return text if cell["std"] is None else f"{text} ± {unit * cell['std']:.{digits}f}"


def shown_paired(cell: dict[str, Any] | None, digits: int = 1, unit: float = 1) -> str:
    """`mean (low to high)`, the 95 % interval."""
    if cell is None:
        return ""
    text = f"{unit * cell['mean']:+.{digits}f}"
    if "interval_95" not in cell:
        return text
    low, high = (unit * end for end in cell["interval_95"])
    return f"{text} ({low:+.{digits}f} to {high:+.{digits}f})"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> str:
    """Markdown, the columns `right` aligned to that side."""
    line = "".join("|---:" if i in right else "|---" for i in range(len(header))) + "|"
    return "\n".join(["| " + " | ".join(map(str, cells)) + " |" for cells in [header]] + [line]) + "".join(
        "\n| " + " | ".join(map(str, cells)) + " |" for cells in rows
    )


def tries_table(rows: Iterable[dict[str, Any]], by: Sequence[str], tried: str, score: str, unit: float = 100) -> str:
    """What each value of `tried` gave, the highest in bold; of several rows with one value, such as tasks, the mean."""
    found: dict[tuple[Any, ...], dict[Any, list[float]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in by), {}).setdefault(row[tried], []).append(unit * row[score])
    columns = list(dict.fromkeys(value for values in found.values() for value in values))
    lines = []
    for key, values in found.items():
        means = {value: mean(scores) for value, scores in values.items()}
        best = max(means.values())
        shown = {value: f"**{each:.1f}**" if each == best else f"{each:.1f}" for value, each in means.items()}
        lines.append([*key, *(shown.get(value, "") for value in columns)])
    return table([*by, *(f"{score} at {tried} {value}, %" for value in columns)], lines)


def borda_table(scores: dict[str, dict[str, float]], higher: bool = True, unit: float = 1, digits: int = 1) -> str:
    """The methods by their Borda rank over the tasks, with the mean of the scores beside it."""
    ranked = sorted(borda(scores, higher).items(), key=lambda item: item[1]["rank"])
    return table(
        [f"over {', '.join(scores)}", "Borda rank", "points", "mean"],
        [
            [
                method,
                f"{each['rank']:g}",
                f"{each['points']:g}",
                f"{unit * mean(s[method] for s in scores.values()):.{digits}f}",
            ]
            for method, each in ranked
        ],
    )
