"""Make results.json, a table and losses.png from runs.jsonl: means and standard deviations over seeds, by exit.

PYTHONPATH=. python benchmarks/soft_quality/report.py
"""

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.soft_quality.run import RUNS, STEPS

NAMES = {
    "soft": "SoFT",
    "soft-half": "SoFT, half on the last",
    "soft-most": "SoFT, 9/10 on the last",
    "sft": "SFT",
    "heads": "SFT + a head per exit",
    "cut": "cut, then SFT",
}


def collect() -> dict[str, Any]:
    """metric -> method -> exit -> {mean, sd, seeds}; exits that a method was not measured at are missing."""
    rows = [row for row in map(json.loads, RUNS.read_text().splitlines()) if not row["tune"] and row["steps"] == STEPS]
    found: dict[str, Any] = {}
    for metric in ("loss", "rouge_l"):
        for kind in NAMES:
            values: dict[int, list[float]] = {}
            for row in rows:
                if row["kind"] == kind:
                    for k, value in row.get(metric, {}).items():
                        values.setdefault(int(k), []).append(value)
            found.setdefault(metric, {})[kind] = {
                k: {
                    "mean": statistics.mean(each),
                    "sd": statistics.stdev(each) if len(each) > 1 else None,
                    "seeds": len(each),
                }
                for k, each in sorted(values.items())
            }
    return found


def table(found: dict[str, Any], metric: str) -> str:
    exits = sorted({k for cells in found[metric].values() for k in cells})
    lines = [f"| {metric} after | " + " | ".join(map(str, exits)) + " |", "|---" * (len(exits) + 1) + "|"]
    for kind, name in NAMES.items():
        cells = found[metric][kind]
        if not cells:
            continue
        lines.append(f"| {name} | " + " | ".join(f"{cells[k]['mean']:.3f}" if k in cells else "" for k in exits) + " |")
    return "\n".join(lines)


def main() -> None:
    found = collect()
    Path(__file__).with_name("results.json").write_text(json.dumps(found, indent=2) + "\n")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, metric, label in zip(figure.subplots(1, 2), found, ("loss on E2E NLG", "ROUGE-L"), strict=True):
        for kind, name in NAMES.items():
            cells = found[metric][kind]
            if not cells:
                continue
            axis.errorbar(
                list(cells),
                [cell["mean"] for cell in cells.values()],
                [cell["sd"] or 0 for cell in cells.values()],
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
    figure.savefig(Path(__file__).with_name("losses.png"), dpi=150)
    print(table(found, "loss"), table(found, "rouge_l"), sep="\n\n")


if __name__ == "__main__":
    main()
