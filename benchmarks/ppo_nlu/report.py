"""The tables and plots of runs.jsonl.

PYTHONPATH=. python benchmarks/ppo_nlu/report.py
"""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from benchmarks.ppo_nlu.run import BATCH, ROLLOUT, RUNS, SFT_STEPS, TUNE_SEED
from benchmarks.tasks import read

HERE = Path(__file__).parent
ARMS = ("majority", "zero", "few", "sft", "ppo", "sft-more", "sft-longer")
CURVES = (("reward", "reward"), ("kl", "KL to the SFT model, per answer"), ("entropy", "entropy per token"))


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table(runs: list[dict[str, Any]]) -> str:
    lines = ["| task | run | score | minus sft | unparsable | read leniently | steps | CPU s to train | seeds |"]
    lines.append("|---|---|---|---|---:|---:|---:|---:|---|")
    for task in dict.fromkeys(run["task"] for run in runs):
        of_task = [run for run in runs if run["task"] == task]
        start = {run["seed"]: run["score"] for run in of_task if run["arm"] == "sft"}
        for arm in ARMS:
            some = [run for run in of_task if run["arm"] == arm]
            if not some:
                continue
            trained = "train_s" in some[0]
            gains = [run["score"] - start[run["seed"]] for run in some if run["seed"] in start]
            cells = [
                task,
                arm,
                spread([run["score"] for run in some]),
                spread(gains) if arm in ("ppo", "sft-more", "sft-longer") else "",
                f"{mean(run['unparsable'] for run in some):.2f}",
                f"{mean(run['lenient']['score'] for run in some):.3f}",
                f"{mean(run['steps'] for run in some):.0f}" if trained else "",
                f"{mean(run['train_s'][1] for run in some):.0f}" if trained else "",
                ", ".join(str(run["seed"]) for run in some),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_tasks(runs: list[dict[str, Any]]) -> str:
    """PPO less its start, of each task and of their mean, for each seed."""
    score = {(run["arm"], run["task"], run["seed"]): 100 * run["score"] for run in runs}
    gain = {key[1:]: score[key] - score["sft", *key[1:]] for key in score if key[0] == "ppo"}
    tasks = list(dict.fromkeys(task for task, _ in gain))
    lines = [f"| seed | {' | '.join(tasks)} | mean of {len(tasks)} |", "|---" * (len(tasks) + 2) + "|"]
    means = []
    for seed in sorted({seed for _, seed in gain}):
        mine = {task: gain[task, seed] for task in tasks if (task, seed) in gain}
        cells = [f"{mine[task]:+.1f}" if task in mine else "" for task in tasks]
        if len(mine) == len(tasks):
            means.append(mean(mine.values()))
        lines.append(
            f"| {seed} | {' | '.join(cells)} | {means[-1]:+.1f} |"
            if len(mine) == len(tasks)
            else f"| {seed} | {' | '.join(cells)} | |"
        )
    return "\n".join(lines) + (
        f"\n\nOver the seeds with all tasks: {mean(means):+.1f} ± {stdev(means):.1f}" if len(means) > 1 else ""
    )


def plot(runs: list[dict[str, Any]]) -> None:
    runs = [run for run in runs if run["arm"] == "ppo"]
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    figure = Figure(figsize=(4.2 * len(CURVES), 2.3 * len(tasks)), layout="constrained")
    for axes, task in zip(figure.subplots(len(tasks), len(CURVES), squeeze=False), tasks, strict=True):
        for axis, (name, title) in zip(axes, CURVES, strict=True):
            for run in runs:
                if run["task"] == task:
                    values = [log[name] for log in run["curve"]]
                    axis.plot(range(1, len(values) + 1), values, marker=".", label=f"seed {run['seed']}")
            axis.set_title(f"{task}: {title}", fontsize=10)
            axis.set_xlabel(f"rollout of {BATCH * ROLLOUT}")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "curves.png", dpi=130)


if __name__ == "__main__":
    found = [run for run in read(RUNS) if run["sft_steps"] == SFT_STEPS and run["seed"] != TUNE_SEED]
    print(table(found), over_tasks(found), sep="\n\n")
    if any(run["arm"] == "ppo" for run in found):
        plot(found)
