"""The table of runs.jsonl: each method less fine-tuning, with the interval and whether they are equivalent."""

from itertools import product
from statistics import mean

from scipy.stats import ttest_1samp

from benchmarks.study import Context, Row
from benchmarks.summary import paired, shown, shown_paired, spread, table

ARMS = {
    "A": "pretrained",
    "B": "random weights",
    "C": "pretrained, 200 labelled rows",
    "D": "pretrained, 40 % of labels flipped",
}
MARGIN = 1.0  # points


def by_seed(rows: list[Row], name: str, unit: float) -> dict[int, float]:
    return {row["seed"]: unit * row[name] for row in rows}


def verdict(own: dict[int, float], base: dict[int, float]) -> str:
    """By the 95 % interval; by two one-sided tests at 5 % each where that has 0 inside."""
    found = paired(own, base)
    if found is None or "interval_95" not in found:
        return ""
    low, high = found["interval_95"]
    if low > 0 or high < 0:
        return "better" if low > 0 else "worse"
    differences = [own[seed] - base[seed] for seed in own if seed in base]
    above = ttest_1samp(differences, -MARGIN, alternative="greater").pvalue
    below = ttest_1samp(differences, MARGIN, alternative="less").pvalue
    return "equivalent" if max(above, below) < 0.05 else "unclear"


def report(rows: list[Row], context: Context) -> str:
    runs = context.study.lines_of(rows)
    lines = []
    for name in dict.fromkeys(run["task"] for run in runs):
        for (arm, what), steps in product(ARMS.items(), dict.fromkeys(run["steps"] for run in runs)):
            some = [run for run in runs if (run["task"], run["arm"], run["steps"]) == (name, arm, steps)]
            base = [run for run in some if run["method"] == "fine-tune"]
            for method in dict.fromkeys(run["method"] for run in some):
                own = [run for run in some if run["method"] == method]
                score, other = by_seed(own, "accuracy", 100), by_seed(base, "accuracy", 100)
                nll = paired(by_seed(own, "nll", 1), by_seed(base, "nll", 1))
                compared = method != "fine-tune"
                lines.append(
                    [
                        name,
                        what,
                        steps,
                        method,
                        shown(spread(score.values())),
                        shown_paired(paired(score, other)) if compared else "",
                        verdict(score, other) if compared else "",
                        f"{mean(run['nll'] for run in own):.3f}",
                        shown_paired(nll, 3) if compared else "",
                        f"{100 * mean(run['ece'] for run in own):.1f}",
                        len(own),
                    ]
                )
    header = [
        "task",
        "student",
        "steps",
        "method",
        "accuracy, %",
        "less fine-tuning",
        f"within {MARGIN:g} point",
        "NLL",
    ]
    return table([*header, "NLL less fine-tuning's", "calibration error, %", "seeds"], lines, right=[2, 7, 9, 10])
