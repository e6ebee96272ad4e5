"""The table of runs.jsonl, and density.png with the score against the share of active neurons."""

import statistics
from typing import Any

from matplotlib.figure import Figure

from benchmarks.study import Context, Row
from benchmarks.summary import table

KEYS = ("task", "adapter", "activation", "before", "after", "eps", "lr", "seed")
WAYS = ("train_cut", "keep", "weight", "stack")
PANELS = {"relu": "ReLU, density loss", "cut": "GELU, one threshold", "keep": "GELU, a threshold per layer"}
HEADER = ["task, adapter, activation, steps", "cut", "weight", "seeds", "score", "minus neither", "active", "reduction"]
Curves = dict[tuple, list[tuple[float, float, float]]]


def start_of(run: Row) -> tuple:
    return tuple(run[key] for key in KEYS)


def reductions(runs: list[Row], others: list[Row]) -> tuple[list[float], list[float]]:
    """Percent of active neurons, and how many fewer than the runs with neither; of a T5 by stack."""
    actives, less = [], []
    for part in runs[0].get("stacks", {"model": 0}):
        pairs = [(active_of(run, part), active_of(other, part)) for run, other in zip(runs, others, strict=True)]
        actives.append(100 * statistics.mean(own for own, _ in pairs))
        less.append(100 * statistics.mean(1 - own / other for own, other in pairs))
    return actives, less


def active_of(run: Row, stack: str) -> float:
    return run["exact"] if stack == "model" else run["stacks"][stack]


def report(rows: list[Row], context: Context) -> str:
    """A row for each setting that has its run without loss and cut; drawn are those of three seeds and more."""
    tasks, found = context.settings["tasks"], context.study.lines_of(rows)
    neither = [run for run in found if run["train_cut"] == run["keep"] == run["weight"] == 0]
    failed = [run for run in neither if run["score"] < tasks[run["task"]]["learned"]]
    plain = {start_of(run): run for run in neither if run not in failed}
    groups: dict[tuple, list[Row]] = {}
    for run in found:
        if start_of(run) in plain:
            groups.setdefault((start_of(run)[:-1], tuple(run[way] for way in WAYS)), []).append(run)
    order = list(dict.fromkeys(key for key, _ in groups))
    lines, curves = [], Curves()
    for (key, ways), runs in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        name, adapter, activation, before, after, _, lr = key
        cut, keep, weight, stack = ways
        others = [plain[start_of(run)] for run in runs]
        changes = [100 * (run["score"] - other["score"]) for run, other in zip(runs, others, strict=True)]
        actives, less = reductions(runs, others)
        if len(runs) > 2:
            for panel in (
                ["relu"] if activation == "relu" else ["keep"] if keep else ["cut"] if cut else ["cut", "keep"]
            ):
                point = (actives[-1], statistics.mean(changes), statistics.stdev(changes))
                curves.setdefault((panel, name, adapter, before, after, lr), []).append(point)
        lines.append(
            [
                f"{name}, {adapter}, {activation}, {before} + {after} at {lr:g}",
                f"{100 * keep:g} % kept" if keep else f"{cut:g}",
                f"{weight:g}{stack and f', {stack} only'}",
                len(runs),
                f"{100 * statistics.mean(run['score'] for run in runs):.1f}",
                f"{statistics.mean(changes):+.1f} ({', '.join(f'{change:+.1f}' for change in changes)})",
                ", ".join(f"{active:.1f} %" for active in actives),
                ", ".join(f"{share:.1f} %" for share in less),
            ]
        )
    draw(curves, context)
    left = "".join(
        f"\n- {', '.join(f'{key} {run[key]}' for key in KEYS)}: score {100 * run['score']:.1f}" for run in failed
    )
    return table(HEADER, lines) + (
        left and f"\n\nLeft out, as the task was not learned before loss and cut began:\n{left}"
    )


def draw(curves: Curves, context: Context) -> None:
    """A panel per way: points of score against the run with neither, by how many neurons are active.

    Of several settings of a task and adapter in a panel the first is drawn.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(1, len(PANELS), sharey=True), strict=True))
    drawn = set()
    for (panel, name, adapter, *_), found in curves.items():
        if len(found) > 1 and (panel, name, adapter) not in drawn:  # more than the run with neither
            drawn.add((panel, name, adapter))
            actives, changes, spreads = zip(*sorted(found), strict=True)
            style: dict[str, Any] = {"marker": "o", "ms": 4, "capsize": 2, "lw": 1.2, "elinewidth": 0.6}
            style |= {
                "color": f"C{list(context.settings['tasks']).index(name)}",
                "ls": "-" if adapter == "lora" else "--",
            }
            panels[panel].errorbar(actives, changes, spreads, label=f"{name}, {adapter}", **style)
    for panel, axis in panels.items():
        axis.axhline(-1, color="gray", lw=0.8, ls="--")
        axis.set_title(PANELS[panel])
        axis.set_xscale("log")
        ticks = [1, 3, 10, 30, 100]
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
        axis.set_xlabel("active neurons (T5: of its decoder), %")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    panels["relu"].set_ylabel("points of score against the run with neither")
    figure.savefig(context.folder / "density.png", dpi=150)
