"""The tables and plots of runs.jsonl."""

from statistics import mean
from typing import Any

from matplotlib.ticker import MaxNLocator

from benchmarks.pictures import legend, panels, save, style
from benchmarks.study import Context, Row
from benchmarks.summary import borda_table, shown, spread, table

TRAINED = ("sft", "ppo", "sft-more", "sft-longer")
ARMS = ("majority", "zero", "few", *TRAINED)
HEADER = [
    "task",
    "run",
    "start",
    "score",
    "minus sft",
    "unparsable",
    "read leniently",
    "steps",
    "CPU s to train",
    "seeds",
]


def started(run: Row) -> str:
    """How the run's supervised start was made; the evaluations without training have none."""
    return f"{run['sft_steps']}{', balanced' if run['balanced'] else ''}" if run["arm"] in TRAINED else ""


def of_arms(runs: list[Row]) -> str:
    lines = []
    start = {(run["task"], started(run), run["seed"]): run["score"] for run in runs if run["arm"] == "sft"}
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    keys = {(run["task"], started(run), run["arm"]) for run in runs}
    for task, way, arm in sorted(keys, key=lambda key: (tasks.index(key[0]), key[1], ARMS.index(key[2]))):
        some = [run for run in runs if (run["task"], started(run), run["arm"]) == (task, way, arm)]
        trained = arm in TRAINED
        gains = [run["score"] - start[task, way, run["seed"]] for run in some] if trained and arm != "sft" else []
        cells: list[Any] = [task, arm, way, shown(spread(run["score"] for run in some), 3)]
        cells += [shown(spread(gains), 3) if gains else "", f"{mean(run['unparsable'] for run in some):.2f}"]
        cells += [f"{mean(run['lenient']['score'] for run in some):.3f}"]
        cells += [f"{mean(run['steps'] for run in some):.0f}" if trained else ""]
        cells += [f"{mean(run['train_s'][1] for run in some):.0f}" if trained else ""]
        lines.append([*cells, len(some)])
    return table(HEADER, lines, right=range(5, 10))


def ranked(runs: list[Row]) -> str:
    """The arms that all tasks have, from balanced rows where there are such runs."""
    scores: dict[str, dict[str, float]] = {}
    for task in dict.fromkeys(run["task"] for run in runs):
        of_task = [run for run in runs if run["task"] == task]
        even = any(run["balanced"] for run in of_task if run["arm"] in TRAINED)
        for arm in ARMS:
            found = [r["score"] for r in of_task if r["arm"] == arm and (arm not in TRAINED or r["balanced"] == even)]
            if found:
                scores.setdefault(task, {})[arm] = mean(found)
    return borda_table(scores, digits=3) if len(scores) > 1 else ""


def over_tasks(runs: list[Row]) -> str:
    """PPO less its start, in points: each task, and the mean of those that all seeds with several tasks have.

    From balanced rows where there are such runs.
    """
    scores: dict[tuple[str, str, int], float] = {}
    for run in sorted(runs, key=lambda run: run["balanced"]):
        scores[run["arm"], run["task"], run["seed"]] = 100 * run["score"]
    gains: dict[int, dict[str, float]] = {}
    for arm, task, seed in scores:
        if arm == "ppo":
            gains.setdefault(seed, {})[task] = scores[arm, task, seed] - scores["sft", task, seed]
    several = [seed for seed, of_seed in gains.items() if len(of_seed) > 1]
    tasks = list(dict.fromkeys(task for of_seed in gains.values() for task in of_seed))
    shared = [task for task in tasks if all(task in gains[seed] for seed in several)]
    means = {seed: mean(gains[seed][task] for task in shared) for seed in several}
    lines = []
    for seed, of_seed in sorted(gains.items()):
        cells = [f"{of_seed[task]:+.1f}" if task in of_seed else "" for task in tasks]
        lines.append([seed, *cells, f"{means[seed]:+.1f}" if seed in means else ""])
    text = table(["seed", *tasks, f"mean of {', '.join(shared)}"], lines)
    if len(means) > 1:
        text += f"\n\nMean over these seeds: {shown(spread(means.values()), sign='+')}"
    return text


def plot(runs: list[Row], context: Context) -> None:
    """A panel per task, the balanced runs where there are such: the reward, and the score before and after."""
    even = {run["task"] for run in runs if run["balanced"]}
    runs = [run for run in runs if run["balanced"] or run["task"] not in even]
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    figure, axes = panels(len(tasks), 2.2 * len(tasks), 3.9)
    learned = []
    for axis, task in zip(axes, tasks, strict=True):
        of_task = {arm: [run for run in runs if run["task"] == task and run["arm"] == arm] for arm in ("sft", "ppo")}
        for run in of_task["ppo"]:
            values = [log["reward"] for log in run["curve"]]
            axis.plot(
                range(1, len(values) + 1), values, label=f"seed {run['seed']}", **style(run["seed"]) | {"ms": 3.5}
            )
        before, after = ([100 * run["score"] for run in of_task[arm]] for arm in ("sft", "ppo"))
        # each seed gains more than what a score of these rows is known to
        if min(end - start for start, end in zip(before, after, strict=True)) > 5:
            learned.append(task)
        scores = [round(mean(each), 1) + 0.0 for each in (before, after)]  # no -0.0
        axis.set_title(f"{task}\nscore {scores[0]} to {scores[1]}", fontsize=10)
        axis.set_xlabel(f"rollout of {context.settings['batch'] * context.settings['rollout']}")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[0].set_ylabel("mean reward of the rollout")
    legend(figure, axes, 3, "score: on validation rows, times 100, before and after PPO, the mean of the seeds")
    finding = f"PPO from a short start learns {len(learned)} of {len(tasks)} tasks on every seed: {', '.join(learned)}"
    save(figure, context.folder / "curves.png", finding)


def report(rows: list[Row], context: Context) -> str:
    runs = context.study.lines_of(rows)
    if any(run["arm"] == "ppo" for run in runs):
        plot(runs, context)
    return "\n\n".join([of_arms(runs), ranked(runs), over_tasks(runs)])
