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
    "dylora-paper": ((("dylora-paper",), "trained"), "DyLoRA, the paper's rules (1 run)", "tab:orange", "^"),
    "lora32-svd": ((LORA, "svd"), "LoRA r=32 cut by its singular values", "tab:green", "v"),
    "lora32-index": ((LORA, "index"), "LoRA r=32 cut to its first components", "tab:red", "x"),
}
Runs = list[dict[str, Any]]


def points(runs: Runs, way: str) -> dict[int, dict[int, dict[str, float]]]:
    """Loss and accuracy by seed and rank."""
    (methods, curve), *_ = WAYS[way]
    found: dict[int, dict[int, dict[str, float]]] = {}
    for run in runs:
        if run["method"] in methods and run["seed"] in SEEDS:
            for rank, point in run["curves"].get(curve, {}).items():
                found.setdefault(run["seed"], {})[int(rank)] = point
    return {seed: by_rank for seed, by_rank in sorted(found.items()) if len(by_rank) == len(RANKS)}


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def summarise(runs: Runs) -> dict[str, Any]:
    """Mean and deviation over the seeds, by rank and over the ranks, and each way's distance to the dedicated LoRAs."""
    summary: dict[str, Any] = {}
    for way in WAYS:
        seeds = points(runs, way)
        if not seeds:
            continue
        summary[way] = {"seeds": list(seeds)}
        for metric in ("loss", "accuracy"):
            table = {rank: spread([by_rank[rank][metric] for by_rank in seeds.values()]) for rank in RANKS}
            overall = spread([mean(by_rank[rank][metric] for rank in RANKS) for by_rank in seeds.values()])
            summary[way][metric] = {"by_rank": table, "over_ranks": overall}
    for way, entry in summary.items():
        own, other = summary.get("dedicated"), entry
        if own is None or way == "dedicated" or own["seeds"] != other["seeds"]:
            continue
        losses = {r: other["loss"]["by_rank"][r]["mean"] / own["loss"]["by_rank"][r]["mean"] - 1 for r in RANKS}
        points_behind = {
            r: 100 * (own["accuracy"]["by_rank"][r]["mean"] - other["accuracy"]["by_rank"][r]["mean"]) for r in RANKS
        }
        entry["behind_dedicated"] = {
            "mean_loss": other["loss"]["over_ranks"]["mean"] - own["loss"]["over_ranks"]["mean"],
            "mean_accuracy_points": 100
            * (own["accuracy"]["over_ranks"]["mean"] - other["accuracy"]["over_ranks"]["mean"]),
            "loss_percent": {r: 100 * value for r, value in losses.items()},
            "accuracy_points": points_behind,
            "worst_loss_percent": 100 * max(losses.values()),
            "worst_accuracy_points": max(points_behind.values()),
        }
    return summary


def table(task: str, summary: dict[str, Any]) -> str:
    lines = []
    for metric, unit, digits in (("loss", 1, 3), ("accuracy", 100, 1)):
        lines += [
            f"| {task}, {metric} | " + " | ".join(f"r={r}" for r in RANKS) + " | mean | worst rank behind own LoRA |"
        ]
        lines += ["|---" * (len(RANKS) + 3) + "|"]
        for way, entry in summary.items():
            cells = [
                f"{unit * cell['mean']:.{digits}f} ± {unit * cell['std']:.{digits}f}"
                for cell in [*entry[metric]["by_rank"].values(), entry[metric]["over_ranks"]]
            ]
            behind = entry.get("behind_dedicated")
            if behind is None:
                gap = ""
            else:
                gap = f"{behind['worst_loss_percent']:+.1f} %" if metric == "loss" else ""
                gap = gap or f"{behind['worst_accuracy_points']:+.1f} points"
            lines.append(f"| {way} | " + " | ".join(cells) + f" | {gap} |")
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
            cells = entry[metric]["by_rank"].values()
            means, stds = ([unit * cell[key] for cell in cells] for key in ("mean", "std"))
            axis.errorbar(range(len(RANKS)), means, stds, label=label, color=colour, marker=marker, capsize=3, lw=1.5)
        axis.set_xticks(range(len(RANKS)), RANKS)
        axis.set_xlabel("rank")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    seeds = len(next(iter(summary.values()))["seeds"])
    figure.suptitle(
        f"{task}: {setting['steps']} steps of {setting['batch_size']}, {setting['model']}, "
        f"mean and deviation of {seeds} seeds"
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
