"""The table of runs.jsonl, and a plot of the scores."""

from statistics import mean

from matplotlib.figure import Figure

from benchmarks.study import Context, Row
from benchmarks.summary import paired, shown, shown_paired, spread, table

NAMES = {
    "start": "start",
    "again": "supervised, the same rows again",
    "rloo": "RLOO (TRL)",
    "grpo": "GRPO (TRL)",
    "ppo": "PPO",
    "further": "supervised, answers of the further rows",
}
LOOKS = {
    "again": ("#7f7f7f", "s"),
    "rloo": ("#009e73", "v"),
    "grpo": ("#e69f00", "D"),
    "ppo": ("#0072b2", "o"),
    "further": ("#cc79a7", "^"),
}


def by_seed(runs: list[Row], labelled: int, arm: str, level: int | None = None) -> dict[int, float]:
    some = [run for run in runs if (run["labelled"], run["arm"]) == (labelled, arm)]
    return {run["seed"]: 100 * (run["score"] if level is None else run["by_level"][level]) for run in some}


def report(rows: list[Row], context: Context) -> str:
    runs = context.study.lines_of(rows)
    known = sorted({run["labelled"] for run in runs})
    lines, levels = [], []
    for labelled in known:
        start, ppo = by_seed(runs, labelled, "start"), by_seed(runs, labelled, "ppo")
        for arm, name in NAMES.items():
            own = by_seed(runs, labelled, arm)
            if not own:
                continue
            some = [run for run in runs if (run["labelled"], run["arm"]) == (labelled, arm)]
            seconds = f"{mean(run['train_s'] for run in some):.0f}"
            gain = "" if arm == "start" else shown_paired(paired(own, start))
            less = "" if arm in ("start", "ppo") else shown_paired(paired(ppo, own))
            lines.append([labelled, name, shown(spread(own.values())), gain, less, seconds, len(own)])
            each = [shown(spread(by_seed(runs, labelled, arm, level).values())) for level in range(3)]
            levels.append([labelled, name, *each])
    plot(runs, known, context)
    return "\n\n".join(
        [
            table(
                ["rows with answers", "run", "score, %", "less the start", "PPO less it", "CPU s", "seeds"],
                lines,
                right=[0, 5, 6],
            ),
            table(["rows with answers", "run", "three numbers, %", "four", "five"], levels, right=[0]),
        ]
    )


def plot(runs: list[Row], known: list[int], context: Context) -> None:
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axis = figure.subplots()
    for arm, (colour, marker) in LOOKS.items():
        gains = {}
        for labelled in known:
            start, own = by_seed(runs, labelled, "start"), by_seed(runs, labelled, arm)
            gains[labelled] = [own[seed] - start[seed] for seed in own if seed in start]
        places = [i + 0.08 * ([*LOOKS].index(arm) - 2) for i, labelled in enumerate(known) for _ in gains[labelled]]
        values = [gain for labelled in known for gain in gains[labelled]]
        axis.plot(places, values, marker, color=colour, label=NAMES[arm], markersize=6, alpha=0.85)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(known)), [str(labelled) for labelled in known])
    axis.set_xlabel("rows with answers that the start was trained on")
    axis.set_ylabel("points of score above the start (a mark a seed)")
    axis.set_title("Without further answers PPO gains most; with them supervision does", fontsize=11)
    axis.grid(axis="y", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(context.folder / "gain.png", dpi=130)
