"""Tables and a plot of runs.jsonl: results.json, and scores.png with the score by parameters of each task."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from benchmarks.study import Context, Row
from benchmarks.summary import borda_table, paired, shown, shown_paired, spread, table

MARKERS = "osD^vP*<>Xhp"
METRICS = {"accuracy": "accuracy (%)", "matthews": "Matthews (x 100)", "correlation": "Pearson and Spearman (x 100)"}
BASE = "lora"


def tuned(rows: list[Row], task: str, method: str, steps: int, seed: int) -> dict[str, Any] | None:
    """Each rate that was tried on the spare seed, and the one of the best score; of equal ones, of the least loss."""
    key = {"task": task, "method": method, "seed": seed, "steps": steps}
    tried = [row for row in rows if key.items() <= row.items()]
    if not tried:
        return None
    points = {row["lr"]: {"score": row["score"], "loss": row["loss"]} for row in tried}
    best = min(tried, key=lambda row: (-row["score"], row["loss"]))["lr"]
    return {"tried": dict(sorted(points.items())), "best": best}


def summarise(runs: list[Row], rows: list[Row], context: Context) -> dict[str, Any]:
    """By method: its rate, its parameters, mean and deviation of score and loss, and the difference to LoRA."""
    by_method: dict[str, list[Row]] = {}
    for method in context.study.grid["method"]:
        if own := [run for run in runs if run["method"] == method]:
            by_method[method] = own
    summary: dict[str, Any] = {}
    for method, own in by_method.items():
        last = own[-1]
        entry: dict[str, Any] = {"lr": last["lr"], "parameters": last["parameters"]}
        for metric in ("score", "loss"):
            mine, base = ({run["seed"]: run[metric] for run in some} for some in (own, by_method.get(BASE, [])))
            entry[metric] = {**spread(mine.values()), "by_seed": dict(sorted(mine.items()))}
            if method != BASE:
                entry[metric]["minus_lora"] = paired(mine, base)
        entry["step_ms"] = sorted(run["step_ms"] for run in own)
        entry["tuning"] = tuned(rows, last["task"], method, last["steps"], context.settings["tune_seed"])
        summary[method] = entry
    return summary


def over_tasks(tasks: dict[str, Any]) -> dict[str, Any]:
    """The mean score over the tasks of a model, by seed, of the methods and seeds that have all of them."""
    result: dict[str, Any] = {}
    kinds = {name: f"{task['setting']['model']}{', long' * name.endswith('-long')}" for name, task in tasks.items()}
    for kind in dict.fromkeys(kinds.values()):
        of_kind = {name: task["methods"] for name, task in tasks.items() if kinds[name] == kind}
        first, *others = of_kind.values()
        if not others:
            continue
        means: dict[str, dict[int, float]] = {}
        for method in first:
            scores = [methods.get(method, {}).get("score", {}).get("by_seed", {}) for methods in of_kind.values()]
            if seeds := [seed for seed in scores[0] if all(seed in by_seed for by_seed in scores)]:
                means[method] = {seed: mean(by_seed[seed] for by_seed in scores) for seed in seeds}
        methods = {}
        for method, own in means.items():
            score = {**spread(own.values()), "by_seed": own}
            if method != BASE:
                score["minus_lora"] = paired(own, means.get(BASE, {}))
            methods[method] = {"parameters": first[method]["parameters"], "score": score}
        result[kind] = {"tasks": list(of_kind), "methods": methods}
    return result


def shown_task(name: str, methods: dict[str, Any]) -> str:
    lines = []
    for method, entry in methods.items():
        counts, score = entry["parameters"], entry["score"]
        fewer = ""
        if BASE in methods:
            of_lora = methods[BASE]["parameters"]
            fewer = ", ".join(f"{of_lora[key] / counts[key]:.1f}x" for key in ("without_head", "with_head"))
        size = f"{counts['without_head']:,}, {counts['with_head']:,}"
        rate = f"{entry['lr']:g}" if "lr" in entry else ""
        gap = shown_paired(score.get("minus_lora"), unit=100)
        lines.append([method, size, fewer, rate, shown(score, unit=100), gap, score["seeds"]])
    header = [
        name,
        "parameters without, with head",
        "LoRA's over its own",
        "rate",
        "score",
        "minus LoRA (95 %)",
        "seeds",
    ]
    return table(header, lines)


def ranked(tasks: dict[str, Any]) -> str:
    """Over the tasks that all methods were run on, if there are several."""
    most = max(len(task["methods"]) for task in tasks.values())
    whole = {name: task["methods"] for name, task in tasks.items() if len(task["methods"]) == most}
    scores = {name: {m: entry["score"]["mean"] for m, entry in methods.items()} for name, methods in whole.items()}
    return borda_table(scores, unit=100) if len(scores) > 1 else ""


def plot(tasks: dict[str, Any], context: Context, path: Path) -> None:
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.6 * rows + 0.8), squeeze=False)
    order = list(context.settings["methods"])
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
                color=f"C{order.index(method)}",
                marker=MARKERS[order.index(method)],
                linestyle="none",
                capsize=3,
            )
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
        for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            ticks(lambda size, _: f"{size / 1000:g}k")
        axis.set_title(f"{name}: {task['setting']['model']}, {task['steps']} steps", fontsize=10)
        axis.set_ylabel(METRICS[task["setting"]["metric"]])
        axis.set_xlabel("trainable parameters without the head")
        axis.grid(alpha=0.3, which="both")
    for axis in list(grid.flat)[len(tasks) :]:
        axis.set_visible(False)
    figure.suptitle(f"Mean and standard deviation of up to {len(context.study.seeds)} seeds (like sizes side by side)")
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.55 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(rows: list[Row], context: Context) -> str:
    reported = context.study.lines_of(rows)
    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(cell["task"] for cell in context.study.cells()):
        if runs := [run for run in reported if run["task"] == name]:
            of_task = [row for row in rows if row["task"] == name and row["steps"] == runs[-1]["steps"]]
            tasks[name] = {
                "setting": runs[-1]["setting"],
                "steps": runs[-1]["steps"],
                "versions": runs[-1]["versions"],
                "minutes": sum(row["seconds"] for row in of_task) / 60,
                "methods": summarise(runs, rows, context),
            }
    means = over_tasks(tasks)
    made = json.dumps({"tasks": tasks, "mean_over_tasks": means}, indent=1)
    (context.folder / "results.json").write_text(made + "\n", encoding="utf-8")
    if tasks:
        plot(tasks, context, context.folder / "scores.png")
    tables = [shown_task(name, task["methods"]) for name, task in tasks.items()]
    tables += [
        shown_task(f"mean of {', '.join(each['tasks'])} ({kind})", each["methods"]) for kind, each in means.items()
    ]
    return "\n\n".join([*tables, ranked(tasks)])
