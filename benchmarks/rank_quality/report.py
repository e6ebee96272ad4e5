"""Tables and plots of runs.jsonl: results.json, and a PNG per task.

python benchmarks/rank_quality/report.py
"""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RANKS = [1, 2, 4, 8, 16, 32]
SEEDS = [11, 12, 13]
# Way to a rank: (methods of run.py, of which a task has one, and the curve of that run), label, colour, marker.
LORA = ("lora", "lora-r/2")
WAYS = {
    "dedicated": ((LORA, "trained"), "LoRA, a run per rank (6 runs)", "black", "o"),
    "dylora": ((("dylora",), "trained"), "DyLoRA (1 run)", "tab:blue", "s"),
    "dylora-half": ((("dylora-half",), "trained"), "DyLoRA, half the steps at r (1 run)", "tab:pink", "P"),
    "dylora-2r": ((("dylora-2r",), "trained"), "DyLoRA, alpha = 2r, lower rate (1 run)", "tab:cyan", "D"),
    "dylora-2r-half": ((("dylora-2r-half",), "trained"), "the same, half the steps at r (1 run)", "tab:purple", "P"),
    "dylora-paper": ((("dylora-paper",), "trained"), "DyLoRA, the paper's rules (1 run)", "tab:orange", "^"),
    "lora32-svd": ((LORA, "svd"), "LoRA r=32 cut by its singular values", "tab:green", "v"),
    "lora32-index": ((LORA, "index"), "LoRA r=32 cut to its first components", "tab:red", "x"),
}
Runs = list[dict[str, Any]]


def points(runs: Runs, way: str) -> dict[int, dict[int, dict[str, float]]]:
    """Loss and accuracy by rank and seed."""
    (methods, curve), *_ = WAYS[way]
    found: dict[int, dict[int, dict[str, float]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run["method"] in methods:
            for rank, point in run["curves"].get(curve, {}).items():
                found.setdefault(int(rank), {})[run["seed"]] = point
    return dict(sorted(found.items()))


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0, "seeds": len(values)}


def over_ranks(by_rank: dict[int, dict[int, dict[str, float]]], metric: str) -> dict[int, float]:
    """The mean over the ranks, by seed, of the seeds that have all ranks."""
    seeds = [seed for seed in SEEDS if all(seed in by_rank.get(rank, {}) for rank in RANKS)]
    return {seed: mean(by_rank[rank][seed][metric] for rank in RANKS) for seed in seeds}


def summarise(runs: Runs) -> dict[str, Any]:
    """Mean and deviation over the seeds, by rank and over the ranks, and each way's distance to the dedicated LoRAs.

    Distances are of the means over the seeds that both have.
    """
    summary: dict[str, Any] = {}
    dedicated = points(runs, "dedicated")
    for way in WAYS:
        own = points(runs, way)
        if not own:
            continue
        entry: dict[str, Any] = {}
        for metric in ("loss", "accuracy"):
            table = {rank: spread([point[metric] for point in seeds.values()]) for rank, seeds in own.items()}
            means = over_ranks(own, metric)
            entry[metric] = {"by_rank": table, "over_ranks": spread(list(means.values())) if means else None}
            if way == "dedicated":
                continue
            behind = {}
            for rank in own.keys() & dedicated.keys():
                both = own[rank].keys() & dedicated[rank].keys()
                if both:
                    ours = mean(own[rank][seed][metric] for seed in both)
                    theirs = mean(dedicated[rank][seed][metric] for seed in both)
                    behind[rank] = 100 * (ours / theirs - 1 if metric == "loss" else theirs - ours)
            target = over_ranks(dedicated, metric)
            paired = [means[seed] - target[seed] for seed in means.keys() & target.keys()]
            entry[metric]["behind_dedicated"] = {
                "unit": "percent" if metric == "loss" else "points",
                "by_rank": dict(sorted(behind.items())),
                "worst": max(behind.values(), default=None),
                "over_ranks_minus_dedicated": spread(paired) if paired else None,
            }
        summary[way] = entry
    return summary


def cell_text(cell: dict[str, float] | None, unit: int, digits: int) -> str:
    """With the number of seeds where it is not that of the study."""
    if cell is None:
        return ""
    text = f"{unit * cell['mean']:.{digits}f}"
    if cell["seeds"] > 1:
        text += f" ± {unit * cell['std']:.{digits}f}"
    return text if cell["seeds"] == len(SEEDS) else f"{text} ({cell['seeds']} of {len(SEEDS)} seeds)"


def table(task: str, summary: dict[str, Any]) -> str:
    lines = []
    for metric, unit, digits in (("loss", 1, 3), ("accuracy", 100, 1)):
        ranks = " | ".join(f"r={rank}" for rank in RANKS)
        lines += [f"| {task}, {metric} | {ranks} | mean | worst rank behind its own LoRA |", "|---" * 9 + "|"]
        for way, entry in summary.items():
            cells = [entry[metric]["by_rank"].get(rank) for rank in RANKS] + [entry[metric]["over_ranks"]]
            shown = [cell_text(cell, unit, digits) for cell in cells]
            behind = entry[metric].get("behind_dedicated")
            gap = "" if behind is None or behind["worst"] is None else f"{behind['worst']:+.1f} {behind['unit']}"
            lines.append(f"| {way} | {' | '.join(shown)} | {gap} |")
        lines.append("")
    return "\n".join(lines)


def plot(task: str, setting: dict[str, Any], summary: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    for axis, metric, name in zip(axes, ("loss", "accuracy"), ("evaluation loss", "accuracy (%)"), strict=True):
        unit = 100 if metric == "accuracy" else 1
        for way, entry in summary.items():
            if way == "lora32-index":
                continue  # far off the scale; in the table
            _, label, colour, marker = WAYS[way]
            cells = entry[metric]["by_rank"]
            means, stds = ([unit * cell[key] for cell in cells.values()] for key in ("mean", "std"))
            axis.errorbar(list(cells), means, stds, label=label, color=colour, marker=marker, capsize=3, lw=1.5)
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, RANKS)
        axis.set_xlabel("rank")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    figure.suptitle(
        f"{task}: {setting['model']}, {setting['steps']} steps of {setting['batch_size']}, "
        f"mean and standard deviation of up to {len(SEEDS)} seeds"
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    with (HERE / "runs.jsonl").open(encoding="utf-8") as lines:
        runs = [json.loads(line) for line in lines]
    results: dict[str, Any] = {
        "command": "python benchmarks/rank_quality/run.py --data DATA --models MODELS",
        "tasks": {},
    }
    for task in dict.fromkeys(run["task"] for run in runs):
        of_task = [run for run in runs if run["task"] == task]
        reported = [run for run in of_task if run["seed"] in SEEDS]
        summary = summarise(reported)
        if not summary:
            continue
        results["tasks"][task] = {
            "setting": reported[-1]["setting"],
            "learning_rates": {run["method"]: run["lr"] for run in reported},
            "adapters": {run["method"]: run["adapter"] for run in reported},
            "versions": reported[-1]["versions"],
            "minutes": sum(run["seconds"] for run in reported) / 60,
            "step_ms": {
                method: sorted(run["step_ms"] for run in reported if run["method"] == method)
                for method in dict.fromkeys(run["method"] for run in reported)
            },
            "summary": summary,
        }
        print(table(task, summary))
        plot(task, reported[-1]["setting"], summary, HERE / f"{task}.png")
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
