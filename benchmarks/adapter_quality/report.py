"""Tables and a plot of runs.jsonl: results.json, and scores.png with the points to LoRA of each task."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.pictures import panels, save, style
from benchmarks.study import Context, Row
from benchmarks.summary import borda_table, paired, shown, shown_paired, spread, table

BASE = "lora"
NAMES = {
    "dora": "DoRA",
    "moslora": "MoSLoRA",
    "loretta-rep": "LoRETTA_rep",
    "loretta-rep-small": "LoRETTA_rep, small",
    "loretta-rep-small-noise": "LoRETTA_rep, small, noise",
    "loretta-adp": "LoRETTA_adp",
}


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
        sizes = []
        for key in ("without_head", "with_head"):
            fewer = f"{methods[BASE]['parameters'][key] / counts[key]:.1f}x" if BASE in methods else ""
            sizes += [f"{counts[key]:,}", fewer]
        rate = f"{entry['lr']:g}" if "lr" in entry else ""
        gap = shown_paired(score.get("minus_lora"), unit=100)
        lines.append([method, *sizes, rate, shown(score, unit=100), gap, score["seeds"]])
    header = [
        name,
        "parameters without head",
        "LoRA's over its own",
        "with head",
        "LoRA's over its own",
        "rate",
        "score",
        "minus LoRA (95 %)",
        "seeds",
    ]
    return table(header, lines, right=range(1, 9))


def ranked(tasks: dict[str, Any]) -> str:
    """Over the tasks that all methods were run on, if there are several."""
    most = max(len(task["methods"]) for task in tasks.values())
    whole = {name: task["methods"] for name, task in tasks.items() if len(task["methods"]) == most}
    scores = {name: {m: entry["score"]["mean"] for m, entry in methods.items()} for name, methods in whole.items()}
    return borda_table(scores, unit=100) if len(scores) > 1 else ""


def plot(tasks: dict[str, Any], means: dict[str, Any], context: Context, path: Path) -> None:
    """A panel per task, a line per method: the score less LoRA's, with the 95 % interval of the paired seeds."""
    figure, axes = panels(len(tasks), 2.15 * len(tasks), 4.2, sharey=True)
    names = {name: label for name, label in NAMES.items() if any(name in task["methods"] for task in tasks.values())}
    sizes: dict[str, list[float]] = {}
    for axis, (task, found) in zip(axes, tasks.items(), strict=True):
        lora = found["methods"][BASE]
        for place, method in enumerate(names):
            entry = found["methods"].get(method)
            less = entry and entry["score"].get("minus_lora")
            if not less:
                continue
            count = entry["parameters"]["without_head"]
            sizes.setdefault(method, []).append(100 * count / lora["parameters"]["without_head"])
            low, high = less.get("interval_95", [less["mean"]] * 2)
            errors = [[100 * (less["mean"] - low)], [100 * (high - less["mean"])]]
            axis.errorbar(100 * less["mean"], place, xerr=errors, capsize=3, **style(place + 1))
        axis.axvline(0, color="0.4", lw=1)
        axis.set_xlim(-12.5, 8.5)
        model = {"minilm": "MiniLM", "smollm2": "SmolLM2"}[found["setting"]["model"]]
        level = f"{found['steps']} steps, LoRA {100 * lora['score']['mean']:.1f}"
        axis.set_title(f"{task.removesuffix('-long')}, {model}\n{level}", fontsize=10)
        axis.set_xlabel("points less LoRA's")
    labels = [f"{label}\n{mean(sizes[name]):.0f} % of LoRA's size" for name, label in names.items()]
    axes[0].set_yticks(range(len(names)), labels)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    behind = [
        -100 * means[kind]["methods"]["loretta-rep-small-noise"]["score"]["minus_lora"]["mean"]
        for kind in ("minilm", "minilm, long")
    ]
    finding = (
        "MoSLoRA is no better than LoRA; LoRETTA_rep, with a tenth of the parameters, is "
        f"{behind[0]:.1f} points behind it on MiniLM after 200 steps and {behind[1]:.1f} after 500"
    )
    figure.supxlabel(
        "mean and 95 % interval of the paired seeds; an interval that leaves a panel is longer", fontsize=9
    )
    save(figure, path, finding)


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
        plot(tasks, means, context, context.folder / "scores.png")
    tables = [shown_task(name, task["methods"]) for name, task in tasks.items()]
    tables += [
        shown_task(f"mean of {', '.join(each['tasks'])} ({kind})", each["methods"]) for kind, each in means.items()
    ]
    return "\n\n".join([*tables, ranked(tasks)])
