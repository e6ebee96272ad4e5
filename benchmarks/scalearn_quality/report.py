"""The tables of runs.jsonl: every arm by row count and target, beside the warm start, and whether the goal is met."""

from collections.abc import Iterable
from statistics import mean
from typing import Any

from benchmarks.study import Context, Row
from benchmarks.summary import paired, shown, shown_paired, spread, table, tries_table

NAMES = {
    "head": "head alone, no adapter",
    "lora": "fresh LoRA",
    "warm": "LoRA from the best source",
    "mean": "mean of the sources",
    "linear": "PEFT's linear",
    "ties": "TIES",
    "dare_ties": "DARE and TIES",
    "search": "search without gradients",
    "vector": "ScaLearn, vector",
    "scalar": "ScaLearn, scalar",
    "vector-shared": "ScaLearn, vector, shared",
    "scalar-shared": "ScaLearn, scalar, shared",
}
BASE = "warm"
SCALES = [arm for arm, name in NAMES.items() if name.startswith("ScaLearn")]


def by_seed(runs: Iterable[Row]) -> dict[int, float]:
    return {run["seed"]: 100 * run["accuracy"] for run in runs}


def over_targets(runs: list[Row], targets: list[str]) -> dict[int, float]:
    """The mean of each seed that all targets have."""
    scores = [by_seed(run for run in runs if run["task"] == target) for target in targets]
    return {seed: mean(each[seed] for each in scores) for seed in scores[0] if all(seed in each for each in scores)}


def of_rows(runs: list[Row], lora: int) -> tuple[str, dict[str, dict[str, Any] | None]]:
    """The table of a row count, and each arm's mean less the warm start's."""
    targets = list(dict.fromkeys(run["task"] for run in runs))
    of_arms = {arm: [run for run in runs if run["arm"] == arm] for arm in NAMES}
    base = over_targets(of_arms[BASE], targets)
    lines, less = [], {}
    for arm, own in of_arms.items():
        if not own:
            continue
        scores = [by_seed(run for run in own if run["task"] == target) for target in targets]
        means = over_targets(own, targets)
        less[arm] = paired(means, base)
        count = own[-1]["parameters"]["without_head"]
        lines.append(
            [
                NAMES[arm],
                f"{count:,}",
                f"1/{lora / count:,.0f}" if count and lora else "0",
                *(shown(spread(each.values())) if each else "" for each in scores),
                shown(spread(means.values())) if means else "",
                shown_paired(less[arm]) if arm != BASE else "",
                len(means),
            ]
        )
    most = [mean(run["most"] for run in runs if run["task"] == target) for target in targets]
    lines.append(
        ["what most rows say", "0", "0", *(f"{100 * each:.1f}" for each in most), f"{100 * mean(most):.1f}", "", ""]
    )
    header = [
        f"{runs[0]['rows']} rows",
        "numbers trained",
        "of LoRA's",
        *targets,
        "mean",
        "less the warm start",
        "seeds",
    ]
    return table(header, lines, right=[1, 2, 3 + len(targets) + 2]), less


def goal(less: dict[Any, dict[str, Any]], counts: dict[str, int], lora: int, settings: dict[str, Any]) -> str:
    """Whether scales beat the warm start at each of the few row counts, with few enough numbers."""
    lines = []
    for arm in SCALES:
        found = [less.get(rows, {}).get(arm) for rows in settings["few"]]
        if arm not in counts or any(each is None or "interval_95" not in each for each in found):
            continue
        is_small = settings["share"] * counts[arm] <= lora
        is_better = all(each["interval_95"][0] > 0 for each in found)
        is_small_said = f"1/{lora / counts[arm]:,.0f}: {'yes' if is_small else 'no'}"
        said = "met" if is_small and is_better else "not met"
        lines.append([NAMES[arm], is_small_said, *map(shown_paired, found), said])
    header = [f"at most 1/{settings['share']} of LoRA's numbers", *(f"{rows} rows" for rows in settings["few"]), "goal"]
    return table(["arm", *header], lines) if lines else ""


def tries(rows: list[Row], context: Context) -> list[str]:
    """What the spare seed gave: the sources of the warm start with their common rate, and the rates."""
    spare = [row for row in rows if row["seed"] == context.settings["tune_seed"]]
    chosen = {(cell["arm"], cell["task"], cell["source"]) for cell in context.study.cells()}
    of_warm = [row for row in spare if row["arm"] == BASE]
    compared = [(row["rows"], row["lr"]) for row in of_warm if (BASE, row["task"], row["source"]) not in chosen]
    sources = [row for row in of_warm if (row["rows"], row["lr"]) in compared]
    rates = [row for row in spare if (row["arm"], row["task"], row["source"]) in chosen]
    return [
        tries_table(sources, ["task", "rows", "lr"], "source", "accuracy") if sources else "",
        tries_table(rates, ["arm", "rows"], "lr", "accuracy") if rates else "",
    ]


def report(rows: list[Row], context: Context) -> str:
    runs = context.study.lines_of(rows)
    scores = (runs or rows)[-1]["sources"]
    tables = [
        table(
            ["source", "accuracy with its own head, %"],
            [[name, f"{100 * each['accuracy']:.1f}"] for name, each in scores.items()],
            right=[1],
        )
    ]
    counts = {run["arm"]: run["parameters"]["without_head"] for run in runs}
    lora = counts.get("lora", counts.get(BASE, 0))
    less = {}
    for number in dict.fromkeys(run["rows"] for run in runs):
        made, less[number] = of_rows([run for run in runs if run["rows"] == number], lora)
        tables.append(made)
    tables.append(goal(less, counts, lora, context.settings))
    return "\n\n".join(filter(None, [*tables, *tries(rows, context)]))
