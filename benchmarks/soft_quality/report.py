"""The tables of runs.jsonl, results.json and losses.png: means and standard deviations over seeds, by exit."""

import json
from typing import Any

from benchmarks.pictures import legend, panels, save, style
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
    figure, axes = panels(2, 10, 4.4)
    for axis, metric, label in zip(axes, found, ("loss on E2E NLG", "ROUGE-L on E2E NLG"), strict=True):
        for number, (kind, name) in enumerate(NAMES.items()):
            if cells := found[metric][kind]:
                means, stds = ([cell[key] or 0 for cell in cells.values()] for key in ("mean", "std"))
                axis.errorbar(list(cells), means, stds, label=name, capsize=2, **style(number))
        axis.set(xlabel="layers that are run", ylabel=label, xticks=[*found["loss"]["sft"]])
    axes[0].set_yscale("log")
    axes[0].set_yticks([1.5, 2, 3, 5, 10, 20], ["1.5", "2", "3", "5", "10", "20"], minor=False)
    axes[0].minorticks_off()
    legend(figure, axes, 3, "mean and standard deviation of the seeds")
    soft, sft = ([cell["mean"] for cell in found["loss"][kind].values()] for kind in ("soft-most", "sft"))
    finding = (
        f"SoFT with 9/10 of the weight on the last layer has SFT's loss there, {soft[-1]:.3f} for {sft[-1]:.3f}, "
        f"and {soft[0]:.1f} for {sft[0]:.1f} at the first exit"
    )
    save(figure, context.folder / "losses.png", finding)


def report(rows: list[Row], context: Context) -> str:
    found = collect(context.study.lines_of(rows))
    (context.folder / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    plot(found, context)
    return shown_metric(found, "loss") + "\n\n" + shown_metric(found, "rouge_l")
