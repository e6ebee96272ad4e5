"""Tables and plots of runs.jsonl: results.json, and a PNG per task."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.pictures import legend, panels, save, style
from benchmarks.study import Context, Row
from benchmarks.summary import borda_table, paired, shown, spread, table

# Way to a rank: (methods of study.toml, of which a task has one, and the curve of that run), and its label.
LORA = ("lora", "lora-r/2")
WAYS = {
    "dedicated": ((LORA, "trained"), "LoRA, a run per rank (6 runs)"),
    "dylora": ((("dylora",), "trained"), "DyLoRA (1 run)"),
    "dylora-half": ((("dylora-half",), "trained"), "DyLoRA, half the steps at r (1 run)"),
    "dylora-2r": ((("dylora-2r",), "trained"), "DyLoRA, alpha = 2r, lower rate (1 run)"),
    "dylora-2r-half": ((("dylora-2r-half",), "trained"), "the same, half the steps at r (1 run)"),
    "dylora-paper": ((("dylora-paper",), "trained"), "DyLoRA, the paper's rules (1 run)"),
    "lora32-svd": ((LORA, "svd"), "LoRA r=32 cut by its singular values"),
    "lora32-index": ((LORA, "index"), "LoRA r=32 cut to its first components"),
}
UNITS = {"loss": (1, 3), "accuracy": (100, 1)}  # what a mean is multiplied with, and its digits


def points(runs: list[Row], way: str) -> dict[int, dict[int, dict[str, float]]]:
    """Loss and accuracy by rank and seed."""
    (methods, curve), _ = WAYS[way]
    found: dict[int, dict[int, dict[str, float]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run["method"] in methods:
            for rank, point in run["curves"].get(curve, {}).items():
                found.setdefault(int(rank), {})[run["seed"]] = point
    return dict(sorted(found.items()))


def over_ranks(by_rank: dict[int, dict[int, dict[str, float]]], metric: str, ranks: list[int]) -> dict[int, float]:
    """The mean over the ranks, by seed, of the seeds that have all ranks."""
    seeds = [seed for seed in by_rank.get(ranks[0], {}) if all(seed in by_rank.get(rank, {}) for rank in ranks)]
    return {seed: mean(by_rank[rank][seed][metric] for rank in ranks) for seed in seeds}


def behind_dedicated(own: Any, dedicated: Any, metric: str, ranks: list[int]) -> dict[str, Any]:
    """A way's distance to the dedicated LoRAs, of the means over the seeds that both have; plus is worse."""
    behind = {}
    for rank in own.keys() & dedicated.keys():
        if both := own[rank].keys() & dedicated[rank].keys():
            ours, theirs = (mean(of[rank][seed][metric] for seed in both) for of in (own, dedicated))
            behind[rank] = 100 * (ours / theirs - 1 if metric == "loss" else theirs - ours)
    means, target = over_ranks(own, metric, ranks), over_ranks(dedicated, metric, ranks)
    return {
        "unit": "percent" if metric == "loss" else "points",
        "by_rank": dict(sorted(behind.items())),
        "worst": max(behind.values(), default=None),
        "over_ranks_minus_dedicated": paired(means, target),
    }


def summarise(runs: list[Row], ranks: list[int]) -> dict[str, Any]:
    """Mean and deviation over the seeds, by rank and over the ranks, and the distance to the dedicated LoRAs."""
    summary: dict[str, Any] = {}
    dedicated = points(runs, "dedicated")
    for way in WAYS:
        own = points(runs, way)
        if not own:
            continue
        entry: dict[str, Any] = {}
        for metric in UNITS:
            by_rank = {rank: spread(point[metric] for point in seeds.values()) for rank, seeds in own.items()}
            means = over_ranks(own, metric, ranks)
            entry[metric] = {"by_rank": by_rank, "over_ranks": spread(means.values()) if means else None}
            if way != "dedicated":
                entry[metric]["behind_dedicated"] = behind_dedicated(own, dedicated, metric, ranks)
        summary[way] = entry
    return summary


def tables(task: str, summary: dict[str, Any], ranks: list[int], seeds: int) -> list[str]:
    """With the number of seeds where it is not that of the study."""
    made = []
    for metric, (unit, digits) in UNITS.items():
        lines = []
        for way, entry in summary.items():
            cells = [entry[metric]["over_ranks"], *(entry[metric]["by_rank"].get(rank) for rank in ranks)]
            texts = [shown(cell, digits, unit) for cell in cells]
            texts = [
                text if cell is None or cell["seeds"] == seeds else f"{text} ({cell['seeds']} of {seeds} seeds)"
                for text, cell in zip(texts, cells, strict=True)
            ]
            behind = entry[metric].get("behind_dedicated")
            gap = "" if behind is None or behind["worst"] is None else f"{behind['worst']:+.1f}"
            lines.append([way, texts[0], gap, *texts[1:]])
        names, unit_of_gap = [f"r={rank}" for rank in ranks], "%" if metric == "loss" else "points"
        of_gap = f"worst rank behind its own LoRA, {unit_of_gap}"
        header = [f"{task}, {metric}{', %' * (metric == 'accuracy')}, {seeds} seeds", "mean", of_gap, *names]
        made.append(table(header, lines, right=range(1, len(header))))
    return made


def ranked(results: dict[str, Any]) -> list[str]:
    """By the mean over the ranks, of the ways that were run on all tasks."""
    made = []
    for metric, (unit, digits) in UNITS.items():
        scores = {
            task: {
                way: e[metric]["over_ranks"]["mean"] for way, e in each["summary"].items() if e[metric]["over_ranks"]
            }
            for task, each in results.items()
        }
        if len(scores) > 1:
            made.append(
                f"{metric.capitalize()}, mean over the ranks:\n\n{borda_table(scores, metric != 'loss', unit, digits)}"
            )
    return made


def finding(task: str, summary: dict[str, Any]) -> str:
    """What the picture of a task shows of DyLoRA and the dedicated runs, in the mean over the ranks."""
    cells = {way: {metric: entry[metric]["over_ranks"]["mean"] for metric in UNITS} for way, entry in summary.items()}
    own = next(cells[way] for way in ("dylora", "dylora-2r") if way in cells)
    six = cells["dedicated"]
    if max(each["accuracy"] for each in cells.values()) < 0.55:  # of two classes
        return f"{task}: every way is at chance, so it tells none from another"
    return (
        f"{task}, mean over the ranks: one DyLoRA run has an accuracy of {100 * own['accuracy']:.1f} % for "
        f"{100 * six['accuracy']:.1f} % of six LoRA runs, and a loss of {own['loss']:.3f} for {six['loss']:.3f}"
    )


def plot(task: str, run: Row, summary: dict[str, Any], context: Context, path: Path) -> None:
    figure, axes = panels(2, 11, 4.8)
    ways = [way for way in summary if way != "lora32-index"]  # far off the scale; in the table
    for axis, metric, name in zip(axes, ("loss", "accuracy"), ("evaluation loss", "accuracy, %"), strict=True):
        unit = 100 if metric == "accuracy" else 1
        for number, way in enumerate(ways):
            cells = summary[way][metric]["by_rank"]
            means, stds = ([unit * (cell[key] or 0) for cell in cells.values()] for key in ("mean", "std"))
            apart = 2 ** (0.09 * (number - (len(ways) - 1) / 2))
            look = style(list(WAYS).index(way)) | {"label": WAYS[way][1], "capsize": 2, "elinewidth": 0.8}
            axis.errorbar([apart * rank for rank in cells], means, stds, **look)
        axis.set_xscale("log", base=2)
        axis.set_xticks(context.settings["ranks"], context.settings["ranks"])
        axis.set(xlabel="rank", ylabel=name)
    note = (
        f"{run['setting']['model']}, {run['steps']} steps of {run['setting']['batch_size']}; "
        f"mean and standard deviation of up to {len(context.study.seeds)} seeds"
    )
    legend(figure, axes, 2, note)
    save(figure, path, finding(task, summary))


def report(rows: list[Row], context: Context) -> str:
    results: dict[str, Any] = {}
    reported = context.study.lines_of(rows)
    ranks, text = context.settings["ranks"], []
    for task in dict.fromkeys(cell["task"] for cell in context.study.cells()):
        runs = [run for run in reported if run["task"] == task]
        summary = summarise(runs, ranks)
        if not summary:
            continue
        results[task] = {
            "setting": runs[-1]["setting"],
            "steps": runs[-1]["steps"],
            "learning_rates": {run["method"]: run["lr"] for run in runs},
            "adapters": {run["method"]: run["adapter"] for run in runs},
            "versions": runs[-1]["versions"],
            "minutes": sum(run["seconds"] for run in runs) / 60,
            "step_ms": {
                method: sorted(run["step_ms"] for run in runs if run["method"] == method)
                for method in dict.fromkeys(run["method"] for run in runs)
            },
            "summary": summary,
        }
        text += tables(task, summary, ranks, len(context.study.seeds))
        plot(task, runs[-1], summary, context, context.folder / f"{task}.png")
    made = json.dumps({"tasks": results}, indent=1) + "\n"
    (context.folder / "results.json").write_text(made, encoding="utf-8")
    return "\n\n".join([*text, *ranked(results)])
