"""Pictures: where they may be written, and how they look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_dynamic._extras import how_to_install

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def picture_path(path: str | Path) -> Path:
    """The path of a picture to be written.

    Raises:
        ValueError: its suffix is none of the formats.
    """
    path = Path(path)
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ValueError(
            f"path={str(path)!r}: the suffix says the format and must be one of {', '.join(PLOT_SUFFIXES)}; "
            f"try {path.stem + '.png'!r}."
        )
    return path


def new_figure(owner: str, width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
    except ImportError as error:
        raise ImportError(
            f"{owner}.plot needs matplotlib. {how_to_install('plot', 'matplotlib')} {owner}.table() does without."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def plain_axis(axis: Any) -> None:
    """A light grid, and no frame above and on the right."""
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, path: Path, title: str | None) -> Path:
    """Write a figure, under its title if it has one; missing folders are made."""
    if title:
        figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
