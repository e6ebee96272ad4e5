"""The tables of runs.jsonl: each arm beside LoRA on each task, and whether it is within the goal's bounds."""

from typing import Any

from benchmarks.study import Context, Row
from benchmarks.summary import paired, shown, shown_paired, spread, table, tries_table

BASE = "lora"
MIB = 2**20


def by_seed(runs: list[Row], name: str, unit: float) -> dict[int, float]:
    return {run["seed"]: unit * run[name] for run in runs}


def within(less: dict[str, Any] | None, fewer: float, settings: dict[str, Any]) -> str:
    """By the mean, and by the whole interval."""
    if less is None or "interval_95" not in less:
        return ""
    if fewer < settings["fewer"]:
        return "too many numbers"
    if less["mean"] < -settings["points"]:
        return "no"
    return "yes" if less["interval_95"][0] >= -settings["points"] else "in the mean"


def of_task(name: str, runs: list[Row], context: Context) -> str:
    settings, lines = context.settings, []
    of_arms = {arm: [run for run in runs if run["arm"] == arm] for arm in settings["arms"]}
    base = of_arms[BASE]
    lora = base[-1]["parameters"]["at_last"] if base else None
    for arm, own in of_arms.items():
        if not own:
            continue
        score, loss = by_seed(own, "accuracy", 100), by_seed(own, "loss", 1)
        counts, memory = own[-1]["parameters"], own[-1]["held_bytes"]
        less = paired(score, by_seed(base, "accuracy", 100)) if arm != BASE else None
        fewer = lora / counts["at_last"] if lora else 0
        lines.append(
            [
                arm,
                f"{counts['at_first']:,}",
                f"{counts['at_last']:,}",
                f"{fewer:.1f}x" if lora else "",
                f"{own[-1]['lr']:g}",
                shown(spread(score.values())),
                shown_paired(less),
                within(less, fewer, settings),
                shown(spread(loss.values()), 3),
                shown_paired(paired(loss, by_seed(base, "loss", 1)) if arm != BASE else None, 3),
                f"{memory['adapters'] / MIB:.2f}",
                f"{memory['all'] / MIB:.1f}",
                len(own),
            ]
        )
    header = [
        name,
        "updated at first",
        "at last",
        "fewer than LoRA's",
        "rate",
        "accuracy, %",
        "less LoRA's",
        f"within {settings['points']} point with {settings['fewer']}x fewer",
        "loss",
        "less LoRA's",
        "held by adapters, MiB",
        "held in all, MiB",
        "seeds",
    ]
    return table(header, lines, right=[1, 2, 3, 4, 10, 11, 12])


def report(rows: list[Row], context: Context) -> str:
    runs = context.study.lines_of(rows)
    tables = [
        of_task(name, [run for run in runs if run["task"] == name], context)
        for name in dict.fromkeys(run["task"] for run in runs)
    ]
    tries = [row for row in rows if row["seed"] == context.settings["tune_seed"]]
    return "\n\n".join([*tables, *([tries_table(tries, ["task", "arm"], "lr", "accuracy")] if tries else [])])
