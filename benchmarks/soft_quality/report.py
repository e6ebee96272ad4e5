"""The tables of runs.jsonl, results.json and losses.png: means and standard deviations over seeds, by exit."""

import json
from typing import Any

from matplotlib.figure import Figure

from benchmarks.study import Context, Row
from benchmarks.summary import shown, spread, table

NAMES = {
    "soft": "SoFT",
    "soft-half": "SoFT, half on the last",
    "soft-most": "SoFT, 9/10 on the last",
    "sft": "SFT",
    "heads": "SFT + a head per exit",
    "cut": "cut, then SFT",
}


def collect(rows: list[Row]) -> dict[str, Any]:
    """metric -> method -> exit -> {mean, std, seeds}; exits that a method was not measured at are missing."""
    found: dict[str, Any] = {}
    for metric in ("loss", "rouge_l"):
        for kind in NAMES:
            values: dict[int, list[float]] = {}
            for row in rows:
                if row["kind"] == kind:
                    for k, value in row.get(metric, {}).items():
                        values.setdefault(int(k), []).append(value)
            cells = {k: spread(each) for k, each in sorted(values.items())}
            found.setdefault(metric, {})[kind] = cells
    return found


def shown_metric(found: dict[str, Any], metric: str) -> str:
    exits = sorted({k for cells in found[metric].values() for k in cells})
    lines = [
        [name, *(shown(found[metric][kind].get(k), 3) for k in exits)]
        for kind, name in NAMES.items()
        if found[metric][kind]
    ]
    return table([f"{metric} after", *exits], lines)


def plot(found: dict[str, Any], context: Context) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, metric, label in zip(figure.subplots(1, 2), found, ("loss on E2E NLG", "ROUGE-L"), strict=True):
        for kind, name in NAMES.items():
            cells = found[metric][kind]
            if not cells:
                continue
            axis.errorbar(
                list(cells),
                [cell["mean"] for cell in cells.values()],
                [cell["std"] or 0 for cell in cells.values()],
                marker="o",
                label=name,
                capsize=2,
            )
        axis.set_xlabel("layers")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_yscale("log")
    figure.axes[0].set_yticks([1.5, 2, 3, 5, 10, 20], ["1.5", "2", "3", "5", "10", "20"], minor=False)
    figure.axes[0].minorticks_off()
    figure.axes[1].legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(context.folder / "losses.png", dpi=150)


def report(rows: list[Row], context: Context) -> str:
    found = collect(context.study.lines_of(rows))
    (context.folder / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    plot(found, context)
    return shown_metric(found, "loss") + "\n\n" + shown_metric(found, "rouge_l")
