"""The rank curve: what each rank of a trained adapter is worth, and which one to keep.

Notable: the metrics are the caller's. `evaluate(model)` is called once per rank, on the same model object, and may be a
few lines of torch, `lambda model: trainer.evaluate()`, or a benchmark harness.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its types are a package of their own

from peft_dynamic.tuners.dylora.layer import ranked_layers
from peft_dynamic.tuners.dylora.model import active_adapter, at_rank

# Directions that nobody disputes, without the prefixes that trainers put before them.
LOWER_IS_BETTER = {
    *("loss", "nll", "perplexity", "ppl", "bits_per_byte", "bpb", "bits_per_character", "bpc"),
    *("error", "error_rate", "wer", "cer", "ter", "mae", "mse", "rmse"),
}
GREATER_IS_BETTER = {
    *("accuracy", "acc", "exact_match", "em", "f1", "f1_macro", "f1_micro", "precision", "recall"),
    *("matthews_correlation", "mcc", "pearson", "pearsonr", "spearman", "spearmanr", "r2", "auc", "roc_auc"),
    *("map", "mrr", "ndcg", "bleu", "sacrebleu", "chrf", "meteor", "nist", "cider", "bertscore"),
    *("rouge1", "rouge2", "rougel", "rougelsum", "reward", "pass_rate", "win_rate"),
}
PREFIXES = ("eval_", "test_", "validation_", "val_", "mean_")
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class RankRow:
    """The metrics at one rank.

    Attributes:
        rank: the rank; None for the base model without the adapter.
        metrics: name -> value.
    """

    rank: int | None
    metrics: dict[str, float]


@dataclass
class RankCurve:
    """Metrics of one adapter at several ranks, as `rank_curve` measures them.

    Args:
        rows: one `RankRow` per rank, increasing; the base model's, if it was measured, comes first.
    """

    rows: list[RankRow] = field(default_factory=list)

    @property
    def ranks(self) -> list[int]:
        """The ranks that were measured."""
        return [row.rank for row in self.rows if row.rank is not None]

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, in the order in which `evaluate` gave them."""
        return list(dict.fromkeys(name for row in self.rows for name in row.metrics))

    def __getitem__(self, rank: int | None) -> dict[str, float]:
        """The metrics at a rank; `curve[None]` is the base model's."""
        for row in self.rows:
            if row.rank == rank:
                return row.metrics
        raise KeyError(f"rank {rank} was not measured; there are {[row.rank for row in self.rows]}")

    def table(self) -> str:
        """The curve as a plain-text table, one line per rank."""
        table = Table("rank")
        for name in self.metrics:
            table.add_column(name, justify="right")
        for row in self.rows:
            cells = [_number(row.metrics[name]) if name in row.metrics else "" for name in self.metrics]
            table.add_row("base" if row.rank is None else str(row.rank), *cells)
        text = io.StringIO()
        Console(file=text, width=20 + 40 * len(self.metrics), color_system=None).print(table)
        return text.getvalue()

    def plot(self, path: str | Path, title: str | None = None) -> Path:
        """Draw each metric over the ranks, the base model as a dashed line, and write a picture.

        Args:
            path: where to write; ".png", ".svg" and ".pdf" say the format. Missing folders are made.
            title: a line above the picture.

        Returns:
            `path`.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another suffix, or there is nothing to draw.
        """
        path = Path(path)
        if path.suffix.lower() not in PLOT_SUFFIXES:
            raise ValueError(
                f"path={str(path)!r}: the suffix says the format and must be one of {', '.join(PLOT_SUFFIXES)}; "
                f"try {path.stem + '.png'!r}."
            )
        if not self.ranks:
            raise ValueError("the curve has no ranks to draw: measure some with rank_curve first.")
        try:
            from matplotlib.figure import Figure  # not pyplot: no global state, no display
        except ImportError as error:
            raise ImportError(
                "RankCurve.plot needs matplotlib: pip install 'peft-dynamic[plot]'. RankCurve.table() does without."
            ) from error

        figure = Figure(figsize=(4.6 * len(self.metrics), 3.6), layout="constrained")
        axes = figure.subplots(1, len(self.metrics), squeeze=False)[0]
        for axis, name in zip(axes, self.metrics, strict=True):
            points = [
                (row.rank, row.metrics[name]) for row in self.rows if row.rank is not None and name in row.metrics
            ]
            axis.plot([rank for rank, _ in points], [value for _, value in points], marker="o", label="adapter")
            base = next((row.metrics.get(name) for row in self.rows if row.rank is None), None)
            if base is not None and math.isfinite(base):
                axis.axhline(base, color="0.45", linestyle="--", label="base model")
            axis.set_xscale("log", base=2)
            axis.set_xticks(_ticks(self.ranks), labels=[str(rank) for rank in _ticks(self.ranks)])
            axis.minorticks_off()
            axis.set_xlabel("rank")
            axis.set_ylabel(name)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        if len(axes[0].get_lines()) > 1:
            axes[0].legend(frameon=False)
        if title:
            figure.suptitle(title)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        return path

    def to_json(self, path: str | Path | None = None) -> str:
        """The curve as JSON text, also written to `path` if given. A value that is not finite becomes null."""
        rows = [
            {
                "rank": row.rank,
                "metrics": {name: value if math.isfinite(value) else None for name, value in row.metrics.items()},
            }
            for row in self.rows
        ]
        text = json.dumps({"rows": rows}, indent=2) + "\n"
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> RankCurve:
        """The curve that `to_json` wrote.

        Args:
            source: the path of the file, or the JSON text itself (a string that starts with a brace).

        Raises:
            ValueError: the text is not a rank curve.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
        try:
            return cls(
                [
                    RankRow(
                        None if row["rank"] is None else int(row["rank"]),
                        {name: math.nan if value is None else float(value) for name, value in row["metrics"].items()},
                    )
                    for row in json.loads(text)["rows"]
                ]
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            where = "the given text" if is_text else str(source)
            raise ValueError(
                f"source: {where} is no rank curve; pass what RankCurve.to_json wrote ({error})."
            ) from error

    def recommend(
        self, tolerance: float = 0.01, metric: str | None = None, greater_is_better: bool | None = None
    ) -> int:
        """The smallest rank whose metric is within a relative tolerance of the best rank's.

        With v* the best value among the ranks (the base model does not count), a rank qualifies if
        |v - v*| <= tolerance * |v*|. Ranks whose value is not finite never qualify.

        Args:
            tolerance: how much worse than the best is still good enough, as a fraction: 0.01 is one per cent.
            metric: which metric; None for the first that `evaluate` gave.
            greater_is_better: the direction; None looks it up for names such as loss, perplexity, accuracy, f1 or bleu.

        Returns:
            The rank.

        Raises:
            ValueError: the tolerance is negative, the metric was not measured or is finite at no rank, or its direction
                is not known.
        """
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance={tolerance!r}: must be a number of at least 0; 0.01 is one per cent.")
        if not self.ranks:
            raise ValueError("the curve has no ranks to choose from: measure some with rank_curve first.")
        if metric is None:
            metric = self.metrics[0]
        if metric not in self.metrics:
            raise ValueError(f"metric={metric!r} was not measured; there are {self.metrics}.")
        if greater_is_better is None:
            greater_is_better = _direction(metric)
        values = {
            row.rank: row.metrics[metric]
            for row in self.rows
            if row.rank is not None and math.isfinite(row.metrics.get(metric, math.nan))
        }
        if not values:
            raise ValueError(f"metric={metric!r} has no finite value at any rank, so no rank can be recommended.")
        best = max(values.values()) if greater_is_better else min(values.values())
        return min(rank for rank, value in values.items() if abs(value - best) <= tolerance * abs(best))


def rank_curve(
    model: nn.Module,
    evaluate: Callable[[Any], dict[str, float]],
    ranks: Sequence[int] | None = None,
    adapter_name: str | None = None,
    base: bool = True,
    progress: bool = True,
) -> RankCurve:
    """Evaluate a DyLoRA adapter at each of its ranks.

    `evaluate` runs in eval mode and without gradients; each module's mode, the rank and the parameters' `requires_grad`
    are afterwards what they were, also after an error.

    Args:
        model: a `PeftModel`, or a transformers model with a DyLoRA adapter added by `add_adapter` or `load_adapter`.
        evaluate: called as `evaluate(model)` once per rank; returns a dict from metric name to number.
        ranks: the ranks to measure, in any order; None for those that were trained.
        adapter_name: the adapter whose rank varies; None for the first active one. Others stay at their rank.
        base: also measure the base model, with all adapters disabled. Left out, with a warning, for an adapter that
            trained the base model's own biases, which cannot be switched off.
        progress: show a progress bar.

    Returns:
        The `RankCurve`, the base model first and the ranks increasing.

    Raises:
        TypeError: `evaluate` returned something else than a dict of numbers.
        ValueError: the model has no such adapter, the adapters are disabled or merged, or a rank is out of range.
    """
    name = active_adapter(model, adapter_name)
    layers = [layer for _, layer in ranked_layers(model, name)]
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("the model's adapters are disabled, so every rank would be the base model. Enable them first.")
    if any(name not in layer.active_adapters for layer in layers):
        raise ValueError(
            f"adapter_name={name!r} is not active, so no rank of it would show. Call set_adapter({name!r})."
        )
    wanted = sorted(set(layers[0].lora_views[name].schedule.ranks if ranks is None else ranks))
    if not wanted:
        raise ValueError("ranks=[]: pass at least one rank, or None for the trained ones.")
    for rank in wanted:  # before hours of evaluation, not after some of it
        with at_rank(model, rank, name):
            pass
    configs: Any = model.peft_config
    bias = getattr(configs[name], "bias", "none")
    if base and bias != "none":
        base = False
        warnings.warn(
            f"the adapter {name!r} trained biases of the base model (bias={bias!r}), which cannot be switched off: "
            "the curve has no row for the base model.",
            stacklevel=2,
        )
    rows = []
    with _eval_mode(model), tqdm(total=len(wanted) + base, desc="rank curve", disable=not progress) as bar:
        for rank in wanted:
            bar.set_postfix_str(f"rank {rank}")
            with at_rank(model, rank, name):
                rows.append(RankRow(rank, _measured(evaluate, model)))
            bar.update()
        if base:
            bar.set_postfix_str("base model")
            with adapters_disabled(model):
                rows.insert(0, RankRow(None, _measured(evaluate, model)))
            bar.update()
    return RankCurve(rows)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base model inside the block, for PEFT models and transformers models alike; `requires_grad` is put back."""
    switches = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for module in switches:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in switches:
            module.enable_adapters(True)
        for parameter, required in gradients:  # PEFT makes the active adapter trainable when it enables it
            parameter.requires_grad_(required)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _measured(evaluate: Callable[[Any], dict[str, float]], model: nn.Module) -> dict[str, float]:
    model.eval()  # an evaluate may have left the model in training mode
    metrics = evaluate(model)
    try:
        values = {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise TypeError(
            f"evaluate must return a dict from metric names to numbers, e.g. {{'loss': 2.1}}; got {metrics!r}."
        ) from error
    if not values:
        raise TypeError("evaluate returned an empty dict; it must return at least one metric, e.g. {'loss': 2.1}.")
    return values


def _direction(metric: str) -> bool:
    short = metric.lower()
    for prefix in PREFIXES:
        short = short.removeprefix(prefix)
    if short in LOWER_IS_BETTER or short in GREATER_IS_BETTER:
        return short in GREATER_IS_BETTER
    raise ValueError(f"whether a greater {metric!r} is better is not known: pass greater_is_better=True or False.")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e5 and math.isfinite(value) else f"{value:.4g}"


def _ticks(ranks: Sequence[int]) -> list[int]:
    """All ranks, or of a long list the powers of two and the last one."""
    if len(ranks) <= 10:
        return list(ranks)
    return [rank for rank in ranks if rank & (rank - 1) == 0 or rank == ranks[-1]]
