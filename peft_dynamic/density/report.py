"""The density report: what share of each layer's activations is active, as a table, a picture and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from peft_dynamic.reports.curve import (
    as_text,
    new_figure,
    picture_path,
    plain_axis,
    read_json,
    save_figure,
    write_json,
)


@dataclass(frozen=True)
class DensityRow:
    """One layer.

    Attributes:
        layer: name of the activation module.
        stack: "model", or "encoder" and "decoder" where the model has both.
        exact: share of the activations that are not exactly 0, from 0 to 1.
        above: share of the activations with |a| > threshold.
        activations: how many were counted.
        dtype: in which they were computed, e.g. "float32"; exact zeros depend on it.
    """

    layer: str
    stack: str
    exact: float
    above: float
    activations: int
    dtype: str


@dataclass
class DensityReport:
    """Densities of a model's layers, as `measure_density` finds them.

    Args:
        threshold: of `above`.
        rows: one `DensityRow` per layer.
    """

    threshold: float
    rows: list[DensityRow] = field(default_factory=list)

    def mean(self, stack: str | None = None, exact: bool = True) -> float:
        """The mean over layers, each counting the same.

        Args:
            stack: of the "encoder" or the "decoder" alone; None for all layers.
            exact: the exact density; False for the one above the threshold.

        Raises:
            ValueError: there is no such stack.
        """
        values = [row.exact if exact else row.above for row in self.rows if stack in (None, row.stack)]
        if not values:
            raise ValueError(f"stack={stack!r}: the layers are of {sorted({row.stack for row in self.rows})}.")
        return sum(values) / len(values)

    def reduction(self, other: DensityReport, stack: str | None = None, exact: bool = True) -> float:
        """How much lower the mean is than another model's, as a share of it: (other - self) / other."""
        before = other.mean(stack, exact)
        return (before - self.mean(stack, exact)) / before if before else 0.0

    def table(self) -> str:
        """The report as a plain-text table, in per cent."""
        table = Table("layer")
        for name in ("exact %", f"|a| > {self.threshold:g} %"):
            table.add_column(name, justify="right")
        table.add_column("dtype")
        for row in self.rows:
            table.add_row(row.layer, f"{100 * row.exact:.2f}", f"{100 * row.above:.2f}", row.dtype)
        stacks = list(dict.fromkeys(row.stack for row in self.rows))
        for stack in [*stacks, None] if len(stacks) > 1 else [None]:
            name = "mean" if stack is None else f"mean of the {stack}"
            table.add_row(name, f"{100 * self.mean(stack):.2f}", f"{100 * self.mean(stack, exact=False):.2f}", "")
        return as_text(table, width=200)

    def plot(self, path: str | Path, title: str | None = None, before: DensityReport | None = None) -> Path:
        """Draw the density over the layers and write a picture.

        Args:
            path: where to write; ".png", ".svg" and ".pdf" say the format. Missing folders are made.
            title: a line above the picture.
            before: another model's report, drawn dashed for comparison.

        Returns:
            `path`.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another suffix.
        """
        path = picture_path(path)
        stacks = list(dict.fromkeys(row.stack for row in self.rows))
        figure = new_figure("DensityReport", 1.6 + 4.2 * len(stacks), 3.6)
        axes = figure.subplots(1, len(stacks), squeeze=False, sharey=True)[0]
        for axis, stack in zip(axes, stacks, strict=True):
            for report, line, suffix in ((before, "--", ", before"), (self, "-", "")):
                rows = [row for row in report.rows if row.stack == stack] if report is not None else []
                for values, color, size, label in (  # where the two agree, one ring lies around the other's dot
                    ([row.exact for row in rows], "C0", 8, "not exactly 0"),
                    ([row.above for row in rows], "C1", 4, f"|a| > {report.threshold:g}" if report is not None else ""),
                ):
                    if rows:
                        numbers: Sequence[int] = range(1, len(rows) + 1)
                        points = [100 * value for value in values]
                        style = {
                            "color": color,
                            "marker": "o",
                            "markersize": size,
                            "fillstyle": "none" if size > 4 else "full",
                        }
                        axis.plot(numbers, points, line, label=label + suffix, **style)
            axis.set_ylim(-3, 103)
            axis.set_xlabel("layer" if stack == "model" else f"layer of the {stack}")
            axis.xaxis.get_major_locator().set_params(integer=True)
            plain_axis(axis)
        axes[0].set_ylabel("active neurons, %")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
        return save_figure(figure, path, title)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to `path` if given."""
        means = {
            stack or "all": {"exact": self.mean(stack), "above": self.mean(stack, exact=False)}
            for stack in [None, *dict.fromkeys(row.stack for row in self.rows)]
        }
        content = {"threshold": self.threshold, "mean": means, "layers": [asdict(row) for row in self.rows]}
        return write_json(content, path)

    @classmethod
    def from_json(cls, source: str | Path) -> DensityReport:
        """The report that `to_json` wrote.

        Args:
            source: the path of the file, or the JSON text itself (a string that starts with a brace).

        Raises:
            ValueError: the text is not a density report.
        """

        def build(content: Any) -> DensityReport:
            return cls(float(content["threshold"]), [DensityRow(**row) for row in content["layers"]])

        return read_json(source, "density report", "DensityReport.to_json", build)
