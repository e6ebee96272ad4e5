"""Tables and a plot of runs.jsonl: results.json, and scores.png with the score by parameters of each task.

PYTHONPATH=. python benchmarks/adapter_quality/report.py
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator
from scipy.stats import t

from benchmarks.adapter_quality.run import LONG, METHODS, RUNS, SEEDS, TASKS, TUNE_SEED, chosen
from benchmarks.tasks import read

BY_SEED = dict[int, dict[str, Any]]
MARKERS = dict(zip(METHODS, "osD^vP*<>Xhp", strict=True))
METRICS = {"accuracy": "accuracy (%)", "matthews": "Matthews (x 100)", "correlation": "Pearson and Spearman (x 100)"}


def spread(values: list[float]) -> dict[str, Any]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "seeds": len(values)}


def difference(own: dict[int, float], lora: dict[int, float]) -> dict[str, Any] | None:
    """Of the same seeds, with the 95 % interval of Student's t for its mean."""
    paired = [own[seed] - lora[seed] for seed in own if seed in lora]
    if not paired:
        return None
    result = spread(paired)
    if len(paired) > 1:
        half = float(t.ppf(0.975, len(paired) - 1)) * result["std"] / len(paired) ** 0.5
        result["interval_95"] = [result["mean"] - half, result["mean"] + half]
    return result


def reported(name: str, path: Path) -> dict[str, BY_SEED]:
    """The runs of a task by method and seed, at the rate of the last of them and the task's own length."""
    found: dict[str, BY_SEED] = {}
    for row in read(path):
        if row["task"] == name and row["seed"] in SEEDS and row["steps"] == TASKS[name].steps:
            runs = found.setdefault(row["method"], {})
            if any(run["lr"] != row["lr"] for run in runs.values()):
                raise SystemExit(f"{name}, {row['method']}: two learning rates; keep the runs of one in {path.name}")
            runs[row["seed"]] = row
    return {method: found[method] for method in METHODS if method in found}


def tuned(name: str, method: str, path: Path) -> dict[str, Any] | None:
    """Each rate that was tried, and the one chosen."""
    key = {"task": name, "method": method, "seed": TUNE_SEED, "steps": TASKS[name].steps}
    tried = [row for row in read(path) if key.items() <= row.items()]
    if not tried:
        return None
    points = {row["lr"]: {"score": row["score"], "loss": row["loss"]} for row in tried}
    return {"tried": dict(sorted(points.items())), "best": chosen(name, method, path)}


def summarise(name: str, path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    runs = reported(name, path)
    for method, by_seed in runs.items():
        last = next(reversed(by_seed.values()))
        entry: dict[str, Any] = {"lr": last["lr"], "parameters": last["parameters"]}
        for metric in ("score", "loss"):
            own, lora = ({seed: row[metric] for seed, row in rows.items()} for rows in (by_seed, runs.get("lora", {})))
            entry[metric] = {**spread(list(own.values())), "by_seed": dict(sorted(own.items()))}
            if method != "lora":
                entry[metric]["minus_lora"] = difference(own, lora)
        entry["step_ms"] = sorted(row["step_ms"] for row in by_seed.values())
        entry["tuning"] = tuned(name, method, path)
        summary[method] = entry
    return summary


def over_tasks(tasks: dict[str, Any]) -> dict[str, Any]:
    """The mean score over the tasks of a model, by seed, of the methods and seeds that have all of them."""
    result: dict[str, Any] = {}
    kinds = {name: f"{task['setting']['model']}{', long' * (name in LONG)}" for name, task in tasks.items()}
    for model in dict.fromkeys(kinds.values()):
        of_model = {name: task["methods"] for name, task in tasks.items() if kinds[name] == model}
        if len(of_model) < 2:
            continue
        means: dict[str, dict[int, float]] = {}
        for method in METHODS:
            scores = [methods.get(method, {}).get("score", {}).get("by_seed", {}) for methods in of_model.values()]
            seeds = [seed for seed in SEEDS if all(seed in by_seed for by_seed in scores)]
            if seeds:
                means[method] = {seed: mean(by_seed[seed] for by_seed in scores) for seed in seeds}
        first = next(iter(of_model.values()))
        result[model] = {
            "tasks": list(of_model),
            "methods": {
                method: {
                    "parameters": first[method]["parameters"],
                    "score": {
                        **spread(list(own.values())),
                        "by_seed": own,
                        **({"minus_lora": difference(own, means.get("lora", {}))} if method != "lora" else {}),
                    },
                }
                for method, own in means.items()
            },
        }
    return result


def table(name: str, methods: dict[str, Any]) -> str:
    lines = [
        f"| {name} | parameters without, with head | LoRA's over its own | rate | score | minus LoRA (95 %) | seeds |",
        "|---" * 7 + "|",
    ]
    for method, entry in methods.items():
        counts, score = entry["parameters"], entry["score"]
        fewer = ""
        if "lora" in methods:
            of_lora = methods["lora"]["parameters"]
            fewer = ", ".join(f"{of_lora[key] / counts[key]:.1f}x" for key in ("without_head", "with_head"))
        shown = f"{100 * score['mean']:.1f}" + ("" if score["std"] is None else f" ± {100 * score['std']:.1f}")
        paired = score.get("minus_lora")
        gap = "" if paired is None else f"{100 * paired['mean']:+.1f}"
        if paired and "interval_95" in paired:
            low, high = paired["interval_95"]
            gap += f" ({100 * low:+.1f} to {100 * high:+.1f})"
        size = f"{counts['without_head']:,}, {counts['with_head']:,}"
        rate = f"{entry['lr']:g}" if "lr" in entry else ""
        lines.append(f"| {method} | {size} | {fewer} | {rate} | {shown} | {gap} | {score['seeds']} |")
    return "\n".join([*lines, ""])


def plot(tasks: dict[str, Any], path: Path) -> None:
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.6 * rows + 0.8), squeeze=False)
    handles: dict[str, Any] = {}
    for axis, (name, task) in zip(grid.flat, tasks.items(), strict=False):
        placed: list[float] = []
        for method, entry in task["methods"].items():
            score, size = entry["score"], entry["parameters"]["without_head"]
            near = [other for other in placed if abs(size / other - 1) < 0.1]
            placed.append(size)
            handles[method] = axis.errorbar(
                (near or [size])[0] * 1.05 ** len(near),
                100 * score["mean"],
                None if score["std"] is None else 100 * score["std"],
                color=f"C{list(METHODS).index(method)}",
                marker=MARKERS[method],
                linestyle="none",
                capsize=3,
            )
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
        for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            ticks(lambda size, _: f"{size / 1000:g}k")
        axis.set_title(f"{name}: {task['setting']['model']}, {task['setting']['steps']} steps", fontsize=10)
        axis.set_ylabel(METRICS[task["setting"]["metric"]])
        axis.set_xlabel("trainable parameters without the head")
        axis.grid(alpha=0.3, which="both")
    for axis in list(grid.flat)[len(tasks) :]:
        axis.set_visible(False)
    figure.suptitle(f"Mean and standard deviation of up to {len(SEEDS)} seeds (like sizes are drawn side by side)")
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.55 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS, help="the file of lines; results go beside it")
    path = parser.parse_args().runs
    rows = read(path)
    tasks: dict[str, Any] = {}
    for name in TASKS:
        methods = summarise(name, path)
        if not methods:
            continue
        of_task = [row for row in rows if row["task"] == name and row["steps"] == TASKS[name].steps]
        last = [row for row in of_task if row["seed"] in SEEDS][-1]
        tasks[name] = {
            "setting": last["setting"],
            "versions": last["versions"],
            "minutes": sum(row["seconds"] for row in of_task) / 60,
            "methods": methods,
        }
    means = over_tasks(tasks)
    record = {
        "commands": [
            f"PYTHONPATH=. python benchmarks/adapter_quality/run.py --data DATA --models MODELS{end}"
            for end in (" --tune LR ...", "")
        ],
        "tasks": tasks,
        "mean_over_tasks": means,
    }
    path.with_name("results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if tasks:
        plot(tasks, path.with_name("scores.png"))
    for name, task in tasks.items():
        print(table(name, task["methods"]))
    for model, each in means.items():
        print(table(f"mean of {', '.join(each['tasks'])} ({model})", each["methods"]))


if __name__ == "__main__":
    main()
