"""The tables of runs.jsonl, and density.png with the score against the share of active neurons."""

import statistics
from typing import Any

from benchmarks.pictures import COLOURS, MARKERS, legend, panels, save
from benchmarks.study import Context, Row
from benchmarks.summary import paired, shown_paired, table

KEYS = ("task", "adapter", "activation", "before", "after", "eps", "lr", "seed")
WAYS = ("train_cut", "keep", "weight", "stack")
CUTS = {"relu": "ReLU, density loss", "cut": "GELU, one threshold", "keep": "GELU, a threshold per layer"}
ADAPTERS = {"lora": "LoRA", "qlora": "QLoRA"}
NAMES = {
    "sst2": "SST-2, MiniLM",
    "qnli": "QNLI, MiniLM",
    "mrpc": "MRPC, MiniLM",
    "stsb": "STS-B, MiniLM",
    "t5-sst2": "SST-2, T5's decoder",
    "t5-squad": "SQuAD, T5's decoder",
}
SCORES = ["seeds", "score", "points (95 %)", "by seed"]
Curves = dict[tuple, list[tuple[float, float, float, float]]]


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


def is_t5(task: str) -> bool:
    return task.startswith("t5")


def ways_of(run: Row) -> list[str]:
    """Of a T5 with the stack that is cut and has the loss."""
    cut = f"{100 * run['keep']:g} % kept" if run["keep"] else f"{run['train_cut']:g}"
    return [cut, f"{run['weight']:g}", *([run["stack"] or "both"] if is_t5(run["task"]) else [])]


def scores_of(runs: list[Row], others: list[Row]) -> list[Any]:
    """Seeds and score, and with loss or cut the points to the runs with neither: their interval, and least and most."""
    own, base = ({run["seed"]: 100 * run["score"] for run in some} for some in (runs, others))
    cells: list[Any] = [len(runs), f"{statistics.mean(own.values()):.1f}"]
    if runs == others:
        return [*cells, "", ""]
    changes = [own[seed] - base[seed] for seed in own]
    by_seed = f"{min(changes):+.1f} to {max(changes):+.1f}" if len(changes) > 1 else ""
    return [*cells, shown_paired(paired(own, base)), by_seed]


def titled_table(key: tuple, lines: list[list[Any]]) -> str:
    """Of a T5 with the shares of each stack."""
    name, adapter, activation, before, after, _, lr = key
    t5 = is_t5(name)
    shares = ["encoder active, %", "fewer, %", "decoder active, %", "fewer, %"] if t5 else ["active, %", "fewer, %"]
    header = ["cut", "weight", *(["stack"] if t5 else []), *SCORES, *shares]
    title = f"**{name}, {ADAPTERS[adapter]}, {activation}, {before} + {after} at {lr:g}**"
    return f"{title}\n\n{table(header, lines, right=range(len(header)))}"


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
    tables, curves = dict[tuple, list[list[Any]]](), Curves()
    for (key, ways), runs in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        name, adapter, activation, before, after, _, lr = key
        others = [plain[start_of(run)] for run in runs]
        changes = [100 * (run["score"] - other["score"]) for run, other in zip(runs, others, strict=True)]
        actives, less = reductions(runs, others)
        if len(runs) > 2:
            how = "relu" if activation == "relu" else "keep" if runs[0]["keep"] else "cut"
            if ways != (0, 0, 0, ""):
                point = (actives[-1], statistics.mean(changes), statistics.stdev(changes), less[-1])
                curves.setdefault((name, adapter, how, before, after, lr), []).append(point)
        shares = [f"{share:.1f}" for pair in zip(actives, less, strict=True) for share in pair]
        tables.setdefault(key, []).append([*ways_of(runs[0]), *scores_of(runs, others), *shares])
    draw(curves, context)
    left = "".join(
        f"\n- {', '.join(f'{key} {run[key]}' for key in KEYS)}: score {100 * run['score']:.1f}" for run in failed
    )
    by_task = sorted(tables, key=lambda key: list(NAMES).index(key[0]))
    return "\n\n".join(titled_table(key, tables[key]) for key in by_task) + (
        left and f"\n\nLeft out, as the task was not learned before loss and cut began:\n{left}"
    )


def draw(curves: Curves, context: Context) -> None:
    """A panel per task: points of score against the run with neither, by how many neurons are active.

    Of several schedules of a task, adapter and way the first is drawn. A ring is around the fewest active neurons of a
    task and adapter that cost a point at most.
    """
    figure, axes = panels(len(NAMES), 15, 4.6, sharey=True)
    places = dict(zip(NAMES, axes, strict=True))
    chosen: dict[tuple[str, str], tuple[float, float, float]] = {}
    first = {key[:3]: found for key, found in reversed(curves.items())}
    for (name, adapter, how), found in sorted(first.items(), key=lambda item: list(CUTS).index(item[0][2])):
        actives, changes, spreads, _ = zip(*sorted(found), strict=True)
        style: dict[str, Any] = {"marker": MARKERS[list(CUTS).index(how)], "ms": 6, "lw": 1, "elinewidth": 0.7}
        style |= {"color": COLOURS[1 + list(ADAPTERS).index(adapter)], "label": f"{ADAPTERS[adapter]}, {CUTS[how]}"}
        style |= {"mfc": "white", "ls": "--"} if adapter == "qlora" else {}
        places[name].errorbar(actives, changes, spreads, capsize=2, **style)
        for active, change, _, less in found:
            if (change >= -1 and (name, adapter) not in chosen) or (change >= -1 and active < chosen[name, adapter][0]):
                chosen[name, adapter] = (active, change, less)
    for (name, _), (active, change, _) in chosen.items():
        ring = "fewest active within a point"
        places[name].plot(active, change, "o", ms=14, mfc="none", mec="0.2", mew=1.2, ls="none", label=ring)
    for name, axis in places.items():
        axis.axhspan(-1, 0, color="0.91", zorder=0)
        axis.set(title=NAMES[name], xlabel="active neurons, %", xlim=(0, 52))
    axes[0].set_ylabel("points of score, less those of neither loss nor cut")
    note = "mean and standard deviation of three to five seeds; grey: within a point"
    legend(figure, axes, 4, note, ordered=True)
    fewer = [less for *_, less in chosen.values()]
    adapters = {key[:2] for key in curves}
    finding = (
        f"{min(fewer):.0f} to {max(fewer):.0f} % fewer active neurons cost a point of score at most in the mean, "
        f"on {len(chosen)} of {len(adapters)} pairs of task and adapter"
    )
    save(figure, context.folder / "density.png", finding)
