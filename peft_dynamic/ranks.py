"""The rank curve: what each rank of a trained adapter is worth, and which one to keep.

Notable: the metrics are the caller's. `evaluate(model)` is called once per rank, on the same model object, and may be a
few lines of torch, `lambda model: trainer.evaluate()`, or a benchmark harness.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its types are a package of their own

from peft_dynamic.hosts.modes import adapters_disabled, evaluating
from peft_dynamic.reports.curve import Curve, direction, measured
from peft_dynamic.tuners.dylora.layer import ranked_layers
from peft_dynamic.tuners.dylora.model import active_ranked_adapter, at_rank


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
class RankCurve(Curve[RankRow]):
    """Metrics of one adapter at several ranks, as `rank_curve` measures them.

    Args:
        rows: one `RankRow` per rank, increasing; the base model's, if it was measured, comes first.
    """

    kind: ClassVar[str] = "rank"
    row_class: ClassVar[type] = RankRow
    log_scale: ClassVar[bool] = True

    rows: list[RankRow] = field(default_factory=list)

    def settings(self, row: RankRow) -> dict[str, str]:
        return {"rank": "base" if row.rank is None else str(row.rank)}

    def position(self, row: RankRow) -> int | None:
        return row.rank

    def series(self, row: RankRow) -> str:
        return "base model" if row.rank is None else "adapter"

    @property
    def ranks(self) -> list[int]:
        """The ranks that were measured."""
        return [row.rank for row in self.rows if row.rank is not None]

    def __getitem__(self, rank: int | None) -> dict[str, float]:
        """The metrics at a rank; `curve[None]` is the base model's."""
        for row in self.rows:
            if row.rank == rank:
                return row.metrics
        raise KeyError(f"rank {rank} was not measured; there are {[row.rank for row in self.rows]}")

    def recommend(
        self, tolerance: float = 0.01, metric: str | None = None, greater_is_better: bool | None = None
    ) -> int:
        """The smallest rank that keeps all but a fraction of the best rank's gain over the base model.

        With g the gains over the base model and g* the greatest, a rank qualifies if g >= (1 - tolerance) g*: a rank
        that learnt little is told from one that learnt nothing, whatever the metric's size. Where the base model was
        not measured, with v* the best value, a rank qualifies if |v - v*| <= tolerance * |v*|. Ranks whose value is
        not finite never qualify.

        Where no rank is better than the base model, a warning says that nothing was learnt, and the values decide.

        Args:
            tolerance: which fraction may be lost: 0.01 is one per cent.
            metric: which metric; None for the first that `evaluate` gave.
            greater_is_better: the direction; None looks it up for names such as loss, perplexity, accuracy, f1 or bleu.

        Returns:
            The rank.

        Raises:
            ValueError: the tolerance is negative, the metric was not measured or is finite at no rank, or its direction
                is not known.
        """
        rows = [row for row in self.rows if row.rank is not None]
        good = self.good_rows(tolerance, metric, greater_is_better, rows)
        gains = self.gains(metric, greater_is_better)
        most = max(gains.values(), default=0.0)
        if most > 0:
            return min(rank for rank, gain in gains.items() if gain >= (1 - tolerance) * most)
        best = min(row.rank for row in good if row.rank is not None)
        if gains:
            warnings.warn(
                f"no rank is better than the base model: nothing was learnt, and rank {best} is no use. Train "
                "longer, or at another learning rate.",
                stacklevel=2,
            )
        return best

    def gains(self, metric: str | None = None, greater_is_better: bool | None = None) -> dict[int, float]:
        """How much better than the base model each rank is.

        Args:
            metric: as in `recommend`.
            greater_is_better: as in `recommend`.

        Returns:
            rank -> gain, above 0 where the rank is better. Ranks whose value is not finite are left out, and all are
            where the base model was not measured, or has no finite value.

        Raises:
            ValueError: the metric's direction is not known.
        """
        name = (self.metrics or [""])[0] if metric is None else metric
        base = next((row.metrics.get(name, math.nan) for row in self.rows if row.rank is None), math.nan)
        sign = 1 if (direction(name) if greater_is_better is None else greater_is_better) else -1
        gains = {row.rank: sign * (row.metrics.get(name, math.nan) - base) for row in self.rows if row.rank is not None}
        return {rank: gain for rank, gain in gains.items() if math.isfinite(gain)}


def rank_curve(
    model: nn.Module,
    evaluate: Callable[[Any], dict[str, float]],
    ranks: Sequence[int] | None = None,
    adapter_name: str | None = None,
    base: bool = True,
    progress: bool = True,
    on_row: Callable[[RankCurve], object] | None = None,
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
        on_row: called after each row with the curve so far, e.g. to write it down.

    Returns:
        The `RankCurve`, the base model first and the ranks increasing.

    Raises:
        TypeError: `evaluate` returned something else than a dict of numbers.
        ValueError: the model has no such adapter, the adapters are disabled or merged, or a rank is out of range.
    """
    name = active_ranked_adapter(model, adapter_name)
    layers = [layer for _, layer in ranked_layers(model, name)]
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("the model's adapters are disabled, so every rank would be the base model. Enable them first.")
    if any(name not in layer.active_adapters for layer in layers):
        raise ValueError(
            f"adapter_name={name!r} is not active, so no rank of it would show. Call set_adapter({name!r})."
        )
    configs: Any = model.peft_config
    wanted = sorted(set(configs[name].trained_ranks if ranks is None else ranks))
    if not wanted:
        raise ValueError("ranks=[]: pass at least one rank, or None for the trained ones.")
    for rank in wanted:  # before hours of evaluation, not after some of it
        with at_rank(model, rank, name):
            pass
    bias = getattr(configs[name], "bias", "none")
    if base and bias != "none":
        base = False
        warnings.warn(
            f"the adapter {name!r} trained biases of the base model (bias={bias!r}), which cannot be switched off: "
            "the curve has no row for the base model.",
            stacklevel=2,
        )
    rows: list[RankRow] = []

    def add(rank: int | None) -> None:
        bar.set_postfix_str("base model" if rank is None else f"rank {rank}")
        row = RankRow(rank, measured(evaluate, model))
        rows.insert(0 if rank is None else len(rows), row)
        bar.update()
        if on_row is not None:
            on_row(RankCurve(list(rows)))

    with evaluating(model), tqdm(total=len(wanted) + base, desc="rank curve", disable=not progress) as bar:
        for rank in wanted:
            with at_rank(model, rank, name):
                add(rank)
        if base:
            with adapters_disabled(model):
                add(None)
    return RankCurve(rows)
