"""The tables and plots of runs.jsonl.

PYTHONPATH=. python benchmarks/ppo_nlu/report.py
"""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.ppo_nlu.run import BATCH, ROLLOUT, RUNS, TUNE_SEED
from benchmarks.tasks import read

HERE = Path(__file__).parent
TRAINED = ("sft", "ppo", "sft-more", "sft-longer")
ARMS = ("majority", "zero", "few", *TRAINED)
CURVES = (("reward", "reward"), ("kl", "KL to the SFT model, per answer"), ("entropy", "entropy per token"))


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def started(run: dict[str, Any]) -> str:
    """How the run's supervised start was made; the evaluations without training have none."""
    return f"{run['sft_steps']}{', balanced' if run['balanced'] else ''}" if run["arm"] in TRAINED else ""


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| task | run | start | score | minus sft | unparsable | read leniently | steps | CPU s to train | seeds |"
    ]
    lines.append("|---|---|---|---|---|---:|---:|---:|---:|---|")
    start = {(run["task"], started(run), run["seed"]): run["score"] for run in runs if run["arm"] == "sft"}
    order = {arm: i for i, arm in enumerate(ARMS)}
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    keys = {(run["task"], started(run), run["arm"]) for run in runs}
    for task, way, arm in sorted(keys, key=lambda key: (tasks.index(key[0]), key[1], order[key[2]])):
        some = [run for run in runs if (run["task"], started(run), run["arm"]) == (task, way, arm)]
        trained = arm in TRAINED
        gains = [run["score"] - start[task, way, run["seed"]] for run in some] if trained and arm != "sft" else []
        cells = [
            task,
            arm,
            way,
            spread([run["score"] for run in some]),
            spread(gains) if gains else "",
            f"{mean(run['unparsable'] for run in some):.2f}",
            f"{mean(run['lenient']['score'] for run in some):.3f}",
            f"{mean(run['steps'] for run in some):.0f}" if trained else "",
            f"{mean(run['train_s'][1] for run in some):.0f}" if trained else "",
            ", ".join(str(run["seed"]) for run in some),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_tasks(runs: list[dict[str, Any]]) -> str:
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
    lines = [f"| seed | {' | '.join(tasks)} | mean of {', '.join(shared)} |", "|---" * (len(tasks) + 2) + "|"]
    for seed, of_seed in sorted(gains.items()):
        cells = [f"{of_seed[task]:+.1f}" if task in of_seed else "" for task in tasks]
        lines.append(f"| {seed} | {' | '.join(cells)} | {f'{means[seed]:+.1f}' if seed in means else ''} |")
    if len(means) > 1:
        lines.append(f"\nMean over these seeds: {mean(means.values()):+.1f} ± {stdev(means.values()):.1f}")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]]) -> None:
    """A row per task, the balanced runs where there are such."""
    runs = [run for run in runs if run["arm"] == "ppo"]
    even = {run["task"] for run in runs if run["balanced"]}
    runs = [run for run in runs if run["balanced"] or run["task"] not in even]
    tasks = list(dict.fromkeys((run["task"], started(run)) for run in runs))
    figure = Figure(figsize=(4.2 * len(CURVES), 2.3 * len(tasks)), layout="constrained")
    for axes, (task, way) in zip(figure.subplots(len(tasks), len(CURVES), squeeze=False), tasks, strict=True):
        for axis, (name, title) in zip(axes, CURVES, strict=True):
            for run in runs:
                if (run["task"], started(run)) == (task, way):
                    values = [log[name] for log in run["curve"]]
                    axis.plot(range(1, len(values) + 1), values, marker=".", label=f"seed {run['seed']}")
            axis.set_title(f"{task} ({way}): {title}", fontsize=10)
            axis.set_xlabel(f"rollout of {BATCH * ROLLOUT}")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "curves.png", dpi=130)


if __name__ == "__main__":
    found = [{"balanced": False} | run for run in read(RUNS)]
    # 16 steps: an earlier study, with another LoRA
    found = [run for run in found if run["seed"] != TUNE_SEED and run["sft_steps"] != 16]
    print(table(found), over_tasks(found), sep="\n\n")
    if any(run["arm"] == "ppo" for run in found):
        plot(found)
