"""What curves have in common: metrics measured under one setting after another, as a table, a picture and JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from rich.console import Console
from rich.table import Table
from torch import nn

from peft_dynamic.reports.picture import PLOT_SUFFIXES as PLOT_SUFFIXES  # here before, as the next
from peft_dynamic.reports.picture import new_figure as new_figure
from peft_dynamic.reports.picture import picture_path as picture_path
from peft_dynamic.reports.picture import plain_axis as plain_axis
from peft_dynamic.reports.picture import save_figure as save_figure

# Directions that nobody disputes, without the prefixes that trainers put before them.
LOWER_IS_BETTER = {
    *("loss", "nll", "perplexity", "ppl", "bits_per_byte", "bpb", "bits_per_character", "bpc"),
    *("ms_per_token", "seconds", "latency"),
    *("error", "error_rate", "wer", "cer", "ter", "mae", "mse", "rmse"),
}
GREATER_IS_BETTER = {
    *("accuracy", "acc", "exact_match", "em", "f1", "f1_macro", "f1_micro", "precision", "recall"),
    *("matthews_correlation", "mcc", "pearson", "pearsonr", "spearman", "spearmanr", "r2", "auc", "roc_auc"),
    *("map", "mrr", "ndcg", "bleu", "sacrebleu", "chrf", "meteor", "nist", "cider", "bertscore"),
    *("rouge1", "rouge2", "rougel", "rougelsum", "reward", "pass_rate", "win_rate"),
}
PREFIXES = ("eval_", "test_", "validation_", "val_", "mean_")


class Row(Protocol):
    """A dataclass with the setting in its fields, and the metrics under it."""

    @property
    def metrics(self) -> dict[str, float]:
        """Name -> value."""
        ...


R = TypeVar("R", bound=Row)


class Curve(Generic[R]):
    """Rows of metrics, each measured under one setting.

    A subclass is a dataclass with `rows`, says what a row is (`row_class`), what the curve is called in messages
    (`kind`), and how its settings are drawn.
    """

    rows: list[R]
    kind: ClassVar[str]
    row_class: ClassVar[type]
    log_scale: ClassVar[bool] = False
    left_out_empty: ClassVar[tuple[str, ...]] = ()  # fields of a row that the JSON has where they hold something

    # The three that a kind of curve has to say of its rows

    def settings(self, row: R) -> dict[str, str]:
        """The setting of a row, as columns of the table."""
        raise NotImplementedError

    def position(self, row: R) -> int | None:
        """Where the row stands on the x axis; None for a level to compare with, which is drawn as a dashed line."""
        raise NotImplementedError

    def series(self, row: R) -> str:
        """Which line of the picture a row belongs to."""
        raise NotImplementedError

    # What a kind of curve may say beside them

    @property
    def axis_label(self) -> str:
        """What stands under the x axis."""
        return self.kind

    def tick(self, at: int) -> str:
        """A place on the x axis, as it is written there."""
        return str(at)

    def interval(self, row: R, metric: str) -> float | None:
        """Half the width of the 95 % interval of a value; None where it is not known."""
        return None

    def named(self, row: R) -> str:
        """What stands behind "recommended" in the picture."""
        return ""

    def choice(self, metric: str, tolerance: float) -> R | None:
        """The row to mark in the picture."""
        return None

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, in the order in which `evaluate` gave them."""
        return list(dict.fromkeys(name for row in self.rows for name in row.metrics))

    @property
    def positions(self) -> list[int]:
        """What was measured along the x axis, increasing."""
        return sorted({at for row in self.rows if (at := self.position(row)) is not None})

    def table(self) -> str:
        """The curve as a plain-text table, one line per row."""
        columns = list(self.settings(self.rows[0])) if self.rows else [self.kind]
        table = Table(*columns)
        for name in self.metrics:
            table.add_column(name, justify="right")
        for row in self.rows:
            cells = [number(row.metrics[name]) if name in row.metrics else "" for name in self.metrics]
            table.add_row(*self.settings(row).values(), *cells)
        return as_text(table, width=20 * len(columns) + 40 * len(self.metrics))

    def plot(
        self,
        path: str | Path,
        title: str | None = None,
        *,
        mark: bool = True,
        tolerance: float = 0.01,
        metric: str | None = None,
    ) -> Path:
        """Draw each metric, levels to compare with as dashed lines, and write a picture.

        Args:
            path: where to write; ".png", ".svg" and ".pdf" say the format. Missing folders are made.
            title: a line above the picture.
            mark: whether the row that a curve recommends is marked, where it does.
            tolerance: of that choice.
            metric: what that choice goes by, for all metrics that are drawn; None for the first.

        Returns:
            `path`.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another suffix, or there is nothing to draw.
        """
        path = picture_path(path)
        if not self.positions:
            raise ValueError(f"the curve has no {self.kind}s to draw: measure some with {self.kind}_curve first.")
        figure = new_figure(type(self).__name__, 4.6 * len(self.metrics), 3.6)
        axes = figure.subplots(1, len(self.metrics), squeeze=False)[0]
        chosen = self.choice(metric or self.metrics[0], tolerance) if mark else None
        for axis, name in zip(axes, self.metrics, strict=True):
            self._draw(axis, name, chosen)
        if len(axes[0].get_legend_handles_labels()[0]) > 1:
            axes[0].legend(frameon=False)
        return save_figure(figure, path, title)

    def _draw(self, axis: Any, name: str, chosen: R | None) -> None:
        """One metric."""
        for label in dict.fromkeys(self.series(row) for row in self.rows):
            rows = [row for row in self.rows if self.series(row) == label and name in row.metrics]
            drawn = [(at, row) for row in rows if (at := self.position(row)) is not None]
            if drawn:
                spread = [self.interval(row, name) for _, row in drawn]
                axis.errorbar(
                    [at for at, _ in drawn],
                    [row.metrics[name] for _, row in drawn],
                    yerr=None if None in spread else spread,
                    marker="o",
                    capsize=3,
                    label=label,
                )
            levels = [row.metrics[name] for row in rows if self.position(row) is None]
            if levels and math.isfinite(levels[0]):
                self._draw_level(axis, name, levels[0], label)
        at = None if chosen is None else self.position(chosen)
        if chosen is not None and at is not None and name in chosen.metrics:
            axis.scatter([at], [chosen.metrics[name]], s=160, facecolors="none", edgecolors="0.2", zorder=3)
            right = at in self.positions[len(self.positions) // 2 :]
            axis.annotate(
                f"recommended{self.named(chosen)}",
                (at, chosen.metrics[name]),
                (-8 if right else 8, 10),
                textcoords="offset points",
                ha="right" if right else "left",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
        if self.log_scale:
            axis.set_xscale("log", base=2)
        axis.set_xticks(_ticks(self.positions), labels=[self.tick(at) for at in _ticks(self.positions)])
        axis.minorticks_off()
        axis.set_xlabel(self.axis_label)
        axis.set_ylabel(name)
        plain_axis(axis)

    def _draw_level(self, axis: Any, name: str, level: float, label: str) -> None:
        """A dashed line, unless it is so far away that the curve would be flat: then the number alone."""
        drawn = [row.metrics[name] for row in self.rows if self.position(row) is not None and name in row.metrics]
        ends = [each for each in drawn if math.isfinite(each)] or [level]
        if min(ends) - 5 * (max(ends) - min(ends)) <= level <= max(ends) + 5 * (max(ends) - min(ends)):
            axis.axhline(level, color="0.45", linestyle="--", label=label)
        else:
            axis.plot([], [], color="0.45", linestyle="--", label=f"{label}: {number(level)} (not in the picture)")

    def to_json(self, path: str | Path | None = None) -> str:
        """The curve as JSON text, also written to `path` if given. A value that is not finite becomes null."""
        rows: list[dict[str, Any]] = [asdict(row) for row in self.rows]  # type: ignore[call-overload]  # a dataclass of the subclass
        for row in rows:
            for name in self.left_out_empty:
                if row[name] is None or row[name] == {}:
                    del row[name]
            row["metrics"] = {
                name: value if math.isfinite(value) else None for name, value in row.pop("metrics").items()
            }
            if "samples" in row:
                row["samples"] = {
                    name: [value if math.isfinite(value) else None for value in values]
                    for name, values in row["samples"].items()
                }
        return write_json({"rows": rows}, path)

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """The curve that `to_json` wrote.

        Args:
            source: the path of the file, or the JSON text itself (a string that starts with a brace).

        Raises:
            ValueError: the text is no such curve.
        """

        def build(content: Any) -> Any:
            rows = []
            for row in content["rows"]:
                metrics = {name: math.nan if value is None else float(value) for name, value in row["metrics"].items()}
                made = {**row, "metrics": metrics}
                if "samples" in row:
                    made["samples"] = {
                        name: [math.nan if value is None else float(value) for value in values]
                        for name, values in row["samples"].items()
                    }
                rows.append(cls.row_class(**made))
            return cls(rows)  # type: ignore[call-arg]  # a subclass is a dataclass

        return read_json(source, f"{cls.kind} curve", f"{cls.__name__}.to_json", build)

    def good_rows(
        self, tolerance: float, metric: str | None, greater_is_better: bool | None, rows: Iterable[R]
    ) -> list[R]:
        """Those of `rows` whose metric is within a relative tolerance of the best of them.

        With v* the best value, a row qualifies if |v - v*| <= tolerance * |v*|; never one whose value is not finite.

        Args:
            tolerance: how much worse than the best is still good enough, as a fraction: 0.01 is one per cent.
            metric: which metric; None for the first that `evaluate` gave.
            greater_is_better: the direction; None looks it up for names such as loss, perplexity, accuracy, f1 or bleu.
            rows: the rows to choose from.

        Raises:
            ValueError: the tolerance is negative, the metric was not measured or is nowhere finite, or its direction
                is not known.
        """
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance={tolerance!r}: must be a number of at least 0; 0.01 is one per cent.")
        rows = list(rows)
        if not rows:
            raise ValueError(
                f"the curve has no {self.kind}s to choose from: measure them with {self.kind}_curve first."
            )
        name = self.metrics[0] if metric is None else metric
        if name not in self.metrics:
            raise ValueError(f"metric={name!r} was not measured; there are {self.metrics}.")
        if greater_is_better is None:
            greater_is_better = direction(name)
        finite = [row for row in rows if math.isfinite(row.metrics.get(name, math.nan))]
        if not finite:
            raise ValueError(
                f"metric={name!r} has no finite value at any {self.kind}, so no {self.kind} can be recommended."
            )
        values = [row.metrics[name] for row in finite]
        best = max(values) if greater_is_better else min(values)
        return [row for row in finite if abs(row.metrics[name] - best) <= tolerance * abs(best)]


def measured(evaluate: Callable[[Any], dict[str, float]], model: nn.Module) -> dict[str, float]:
    """What `evaluate(model)` returns, which must be a dict of numbers."""
    model.eval()  # an evaluate may have left the model in training mode
    return numbers_of(evaluate(model))


def measured_samples(
    evaluate: Callable[[Any], Mapping[str, Any]], model: nn.Module
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The same, where a metric may have a value for each example: their mean, and the values."""
    model.eval()
    found = evaluate(model)
    if not isinstance(found, Mapping):
        return numbers_of(found), {}
    samples: dict[str, list[float]] = {}
    for name, value in found.items():
        if isinstance(value, str | bytes) or getattr(value, "ndim", 1) != 1 or not hasattr(value, "__len__"):
            continue
        try:
            samples[str(name)] = [float(each) for each in value]
        except (TypeError, ValueError):
            samples[str(name)] = []
        if len(samples[str(name)]) < 2:
            raise TypeError(
                f"evaluate returned {value!r} for {name!r}: return a number, or a number for each of two examples or "
                "more."
            )
    means = {name: sum(values) / len(values) for name, values in samples.items()}
    return numbers_of({name: means.get(str(name), value) for name, value in found.items()}), samples


def numbers_of(metrics: Any) -> dict[str, float]:
    """Metrics as they were returned, as a dict of numbers."""
    try:
        values = {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise TypeError(
            f"evaluate must return a dict from metric names to numbers, e.g. {{'loss': 2.1}}; got {metrics!r}."
        ) from error
    if not values:
        raise TypeError("evaluate returned an empty dict; it must return at least one metric, e.g. {'loss': 2.1}.")
    return values


def direction(metric: str) -> bool:
    """Whether a greater value is better, by the metric's name."""
    short = metric.lower()
    for prefix in PREFIXES:
        short = short.removeprefix(prefix)
    if short in LOWER_IS_BETTER or short in GREATER_IS_BETTER:
        return short in GREATER_IS_BETTER
    raise ValueError(f"whether a greater {metric!r} is better is not known: pass greater_is_better=True or False.")


def number(value: float) -> str:
    """For a table."""
    return f"{value:,.0f}" if abs(value) >= 1e5 and math.isfinite(value) else f"{value:.4g}"


def aligned(values: Sequence[float], signed: bool = False) -> list[str]:
    """Numbers of one column of a table, with the same decimals: four digits of the largest.

    Args:
        values: of which some may be infinite or NaN.
        signed: with a plus before those above 0.
    """
    most = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    decimals = min(9, max(0, 3 - math.floor(math.log10(most)))) if most else 0
    return [f"{value:{'+' if signed else ''},.{decimals}f}" for value in values]


def _ticks(positions: Sequence[int]) -> list[int]:
    """All of them, or of a long list the powers of two and the last one; none that is nearly another."""
    if len(positions) > 10:
        positions = [at for at in positions if at & (at - 1) == 0 or at == positions[-1]]
    apart: list[int] = []
    for at in positions:
        if at < 100 or not apart or at > 1.3 * apart[-1]:
            apart.append(at)
    return apart


def as_text(table: Table, width: int) -> str:
    """A table without colours, on lines of at most `width`."""
    text = io.StringIO()
    # in Jupyter a console displays what it is given, whatever its file
    Console(file=text, width=width, color_system=None, force_jupyter=False).print(table)
    return text.getvalue()


def write_json(content: Any, path: str | Path | None) -> str:
    """The content as JSON text, also written to `path` if given; missing folders are made."""
    text = json.dumps(content, indent=2) + "\n"
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    return text


T = TypeVar("T")


def read_json(source: str | Path, what: str, writer: str, build: Callable[[Any], T]) -> T:
    """What `build` makes of JSON in a file, or in a string that starts with a brace.

    Raises:
        ValueError: it is no JSON, or not what `build` needs.
    """
    is_text = isinstance(source, str) and source.lstrip().startswith("{")
    text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
    try:
        return build(json.loads(text))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        where = "the given text" if is_text else str(source)
        raise ValueError(f"source: {where} is no {what}; pass what {writer} wrote ({error}).") from error
