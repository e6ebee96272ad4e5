"""How the studies' pictures look: each line has a colour and a marker of its own, and the title says what was found."""

from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's, which most of the colour-blind tell apart; the yellow is left out, as it is hard to see on white.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c3a3a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*")


def style(number: int) -> dict[str, Any]:
    """Colour and marker of the line of that number."""
    return {"color": COLOURS[number], "marker": MARKERS[number], "ms": 5.5, "lw": 1.5}


def panels(count: int, width: float, height: float, rows: int = 1, **kwargs: Any) -> tuple[Figure, list[Any]]:
    """A figure with so many axes in rows, without frames above and on the right."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, -(-count // rows), squeeze=False, **kwargs).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in (axes := axes[:count]):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(figure: Figure, axes: list[Any], columns: int, note: str = "", ordered: bool = False) -> None:
    """One legend for all axes, below them, under a note on what is drawn."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(found) if ordered else list(found)
    figure.legend(
        [found[each] for each in labels], labels, loc="outside lower center", ncols=columns, frameon=False, title=note
    )


def save(figure: Figure, path: Path, finding: str) -> None:
    """Write the figure under a title that says what was found."""
    lines = -(-len(finding) // int(9.5 * figure.get_figwidth()))  # so many letters an inch fit; of like length
    figure.suptitle(fill(finding, len(finding) // lines + 8), fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=120, metadata={"Software": None})
