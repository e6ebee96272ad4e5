"""Tables and plots of runs.jsonl: each way to a rank against a LoRA that was trained at that rank."""

from itertools import pairwise
from statistics import mean
from typing import Any

from benchmarks.pictures import legend, panels, save, style
from benchmarks.study import Context, Row
from benchmarks.summary import borda_table, paired, shown, shown_paired, spread, table

# A way -> its label, and (arm, curve) in the order in which a rank is looked for
WAYS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "dedicated": (
        "a LoRA per rank (six runs)",
        [("dedicated-low", "whole"), ("dedicated", "whole"), ("lora", "whole")],
    ),
    "plain": ("LoRA 32, cut plain", [("lora", "plain"), ("lora", "whole")]),
    "inputs": ("LoRA 32, cut by inputs", [("lora", "inputs"), ("lora", "whole")]),
    "loss": ("LoRA 32, cut by the loss", [("lora", "loss"), ("lora", "whole")]),
    "plain, shared": ("LoRA 32, cut plain, one budget", [("lora", "plain, shared"), ("lora", "whole")]),
    "loss, shared": ("LoRA 32, cut by the loss, one budget", [("lora", "loss, shared"), ("lora", "whole")]),
    "loss, shared, few rows": ("the same, 3 % of the rows", [("lora", "loss, shared, few rows"), ("lora", "whole")]),
    "decay": ("LoRA 32 with weight decay, cut plain", [("decay", "plain"), ("decay", "whole")]),
    "refit": ("LoRA 32 for 4/5, cores for 1/5", [("refit", "own"), ("refit", "plain"), ("refit", "whole")]),
    "steep": ("LoRA 32, its tail shrunk, cut plain", [("steep", "plain"), ("steep", "whole")]),
    "steep, loss, shared": ("the same, by the loss, one budget", [("steep", "loss, shared"), ("steep", "whole")]),
    "dylora": ("DyLoRA, a lower rank in 1 step of 4", [("dylora", "own")]),
    "dylora, loss": ("DyLoRA, cut by the loss", [("dylora-calibrated", "loss")]),
    "dylora, loss, shared": ("the same, one budget", [("dylora-calibrated", "loss, shared")]),
    "dylora-half": ("DyLoRA, a lower rank in 1 step of 2", [("dylora-half", "own")]),
    "dylora-paper": ("DyLoRA, the paper's rules", [("dylora-paper", "own")]),
    "matryoshka": ("MatryoshkaLoRA, as released", [("matryoshka", "own")]),
    "matryoshka, cut": ("its gain folded, cut plain", [("matryoshka", "plain"), ("matryoshka", "whole")]),
}
DRAWN = ("dedicated", "dylora", "loss, shared", "plain")
TITLES = {
    "sst2": "SST-2, MiniLM",
    "mrpc": "MRPC, MiniLM",
    "stsb": "STS-B, MiniLM",
    "qnli": "QNLI, MiniLM",
    "e2e_nlg": "E2E NLG, SmolLM2",
    "dart": "DART, SmolLM2",
    "gsm8k": "GSM8K, SmolLM2",
}
BEST = "loss, shared"
SCORES = {"accuracy": 100, "pearson_spearman": 100}
Points = dict[int, dict[int, dict[str, float]]]  # rank -> seed -> metrics


def points(rows: list[Row], way: str, ranks: list[int]) -> Points:
    """Of the seeds that have all ranks of this way."""
    found: Points = {rank: {} for rank in ranks}
    for arm, curve in reversed(WAYS[way][1]):
        for row in rows:
            if row["arm"] == arm:
                for rank, metrics in row["curves"].get(curve, {}).items():
                    if int(rank) in found:
                        found[int(rank)][row["seed"]] = metrics
    seeds = set.intersection(*(set(each) for each in found.values()))
    return {rank: {seed: each[seed] for seed in sorted(seeds)} for rank, each in found.items()}


def over_ranks(found: Points, metric: str) -> dict[int, float]:
    return {seed: mean(found[rank][seed][metric] for rank in found) for seed in next(iter(found.values()))}


def area(found: Points, metric: str) -> dict[int, float]:
    """AURAC by seed: the ranks are powers of two, so that each step of log2 is 1."""
    ranks = list(found)
    return {
        seed: sum((found[a][seed][metric] + found[b][seed][metric]) / 2 for a, b in pairwise(ranks)) / (len(ranks) - 1)
        for seed in found[ranks[0]]
    }


def of(found: Points, rank: int, metric: str) -> dict[int, float]:
    return {seed: metrics[metric] for seed, metrics in found[rank].items()}


def task_tables(task: str, rows: list[Row], ranks: list[int]) -> tuple[str, dict[str, Points]]:
    found = {way: each for way in WAYS if next(iter((each := points(rows, way, ranks)).values()))}
    score = next(name for name in SCORES if name in next(iter(found["dedicated"][1].values())))
    dedicated = found["dedicated"]
    parts = [f"### {task}"]
    for metric, unit, digits in (("loss", 1, 4), (score, SCORES[score], 2)):
        lines = []
        for way, each in found.items():
            sign = 1 if metric == "loss" else -1
            behind = {r: paired(of(each, r, metric), of(dedicated, r, metric)) for r in ranks}
            worst = max((b for b in behind.values() if b), key=lambda b: sign * b["mean"])
            lines.append(
                [
                    WAYS[way][0],
                    *(shown(spread(of(each, r, metric).values()), digits, unit) for r in ranks),
                    shown(spread(area(each, metric).values()), digits, unit),
                    *(
                        ["", ""]
                        if way == "dedicated"
                        else [
                            shown_paired(paired(over_ranks(each, metric), over_ranks(dedicated, metric)), digits, unit),
                            shown_paired(worst, digits, unit),
                        ]
                    ),
                ]
            )
        head = [f"{metric} at rank {r}" if r == ranks[0] else str(r) for r in ranks]
        parts.append(table(["way", *head, "AURAC", "mean less a LoRA per rank", "worst rank"], lines))
    return "\n\n".join(parts), found


def halves(found: dict[str, dict[str, Points]]) -> str:
    """Half the parameters of rank 16 against rank 16."""
    lines = []
    for task, ways in found.items():
        for way in ("plain", "plain, shared", "loss, shared"):
            if way in ways:
                less = paired(of(ways[way], 8, "loss"), of(ways["dedicated"], 16, "loss"))
                whole = paired(of(ways[way], 8, "loss"), of(ways["plain"], 16, "loss"))
                lines.append([task, WAYS[way][0], shown_paired(less, 4), shown_paired(whole, 4)])
    return table(["task", "half of rank 16's parameters", "loss less a LoRA of rank 16", "less the cut at 16"], lines)


def goals(found: dict[str, dict[str, Points]], way: str) -> str:
    """One way against the goals: differences in per cent of the other's loss, with the interval of the paired seeds."""
    lines = []
    for task, ways in found.items():
        if way not in ways:
            continue
        own, dedicated = ways[way], ways["dedicated"]
        below = [r for r in own if r < max(own)]  # at the largest the two are one run
        by_rank = {r: relative(of(own, r, "loss"), of(dedicated, r, "loss")) for r in below}
        worst = max(by_rank, key=lambda r: by_rank[r]["mean"] if by_rank[r] else -1)
        cells = [f"{shown_paired(by_rank[worst], 2)} at {worst}"]
        cells.append(shown_paired(relative(over_ranks(own, "loss"), over_ranks(dedicated, "loss")), 2))
        for other in ("dylora", "dylora-paper", "matryoshka"):
            there = other in ways
            cells.append(shown_paired(relative(area(own, "loss"), area(ways[other], "loss")), 2) if there else "")
        lines.append([task, *cells])
    head = ["worst rank less a LoRA of it", "mean over ranks", "AURAC less DyLoRA's", "the paper's", "MatryoshkaLoRA's"]
    return table(["task, per cent of the loss", *head], lines)


def relative(own: dict[int, float], base: dict[int, float]) -> dict[str, Any]:
    both = [seed for seed in own if seed in base]
    found = paired({seed: 100 * own[seed] / base[seed] for seed in both}, dict.fromkeys(both, 100.0))
    assert found is not None
    return found


def costs(rows: list[Row]) -> str:
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task and row["arm"] == "lora"]
        shares = [100 * row["moments_seconds"] / row["train_seconds"] for row in of_task if "moments_seconds" in row]
        lines.append([task, f"{mean(shares):.1f} %", f"{max(shares):.1f} %"])
    return table(["task", "moments of 5 batches, of the training's time", "at most"], lines)


def draw(axis: Any, task: str, found: dict[str, Points]) -> None:
    """The loss by rank, with the standard error over the seeds; the ways stand a little apart."""
    for number, way in enumerate(DRAWN):
        if way in found:
            spreads = [spread(of(found[way], r, "loss").values()) for r in found[way]]
            errors = [(s["std"] or 0) / s["seeds"] ** 0.5 for s in spreads]
            apart = 2 ** (0.11 * (number - (len(DRAWN) - 1) / 2))
            look = style(number) | {"capsize": 2, "elinewidth": 0.8, "label": WAYS[way][0]}
            axis.errorbar([apart * r for r in found[way]], [s["mean"] for s in spreads], errors, **look)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(found["dedicated"]), labels=[str(r) for r in found["dedicated"]])
    seeds = len(found["dedicated"][1])
    axis.set(xlabel="rank, or as many parameters", title=f"{TITLES[task]}, {seeds} seeds")


def plot(tasks: dict[str, dict[str, Points]], context: Context) -> None:
    """One picture with an axis for each task; its title names where the cut is behind or ahead."""
    tasks = {task: tasks[task] for task in TITLES if task in tasks}
    rows = -(-len(tasks) // 4)
    columns = -(-len(tasks) // rows)
    figure, axes = panels(len(tasks), 3.7 * columns, 0.9 + 3.4 * rows, rows)
    apart: dict[str, list[str]] = {"behind": [], "ahead": []}
    for axis, (task, found) in zip(axes, tasks.items(), strict=True):
        draw(axis, task, found)
        for rank in found["dedicated"]:
            less = paired(of(found[BEST], rank, "loss"), of(found["dedicated"], rank, "loss"))
            low, high = (less or {}).get("interval_95", (0, 0))
            if low > 0 or high < 0:
                apart["behind" if low > 0 else "ahead"].append(f"{TITLES[task].partition(',')[0]} at rank {rank}")
    for axis in axes[::columns]:
        axis.set_ylabel("held-out loss (lower is better)")
    note = "mean and standard error of the seeds; level: the 95 % interval of the difference holds 0"
    legend(figure, axes, len(DRAWN), note)
    but = " and ".join(f"{word} on {', '.join(where)}" for word, where in apart.items() if where)
    finding = "One LoRA, cut to each rank by the loss, is level with six LoRAs, one per rank" + (
        but and f"; it is {but}"
    )
    save(figure, context.folder / "ranks.png", finding)


def report(rows: list[Row], context: Context) -> str:
    rows, ranks = context.study.lines_of(rows), context.settings["ranks"]
    parts, all_found = [], {}
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        if not points(of_task, "dedicated", ranks)[ranks[0]]:  # what all is compared with
            continue
        text, found = task_tables(task, of_task, ranks)
        parts.append(text)
        all_found[task] = found
    shared = [way for way in WAYS if all(way in found for found in all_found.values())]
    areas: dict[str, dict[str, float]] = {
        task: {WAYS[way][0]: mean(area(found[way], "loss").values()) for way in shared}
        for task, found in all_found.items()
    }
    lines = []
    for way in shared:
        means = [mean(over_ranks(found[way], "loss").values()) for found in all_found.values()]
        lines.append([WAYS[way][0], *(f"{each:.4f}" for each in means)])
    parts.append("### Mean loss over the ranks\n\n" + table(["way", *all_found], lines))
    if len(areas) > 1:
        parts.append("### Over the tasks\n\nBy the AURAC of the loss:\n\n" + borda_table(areas, False, 1, 4))
    if not all_found:
        return "No task has a LoRA of each rank yet."
    plot(all_found, context)
    parts.insert(0, "![the loss by rank](ranks.png)")
    parts.append(f"### Against the goals: {WAYS[BEST][0]}\n\n" + goals(all_found, BEST))
    parts += ["### Half of the parameters\n\n" + halves(all_found), "### What the moments cost\n\n" + costs(rows)]
    return "\n\n".join(parts)
