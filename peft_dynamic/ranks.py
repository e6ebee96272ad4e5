"""The rank curve: what each rank of a trained adapter is worth, and which one to keep.

Notable: the metrics are the caller's. `evaluate(model)` is called once per rank, on the same model object, and may be a
few lines of torch, `lambda model: trainer.evaluate()`, or a benchmark harness.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from typing import Any, ClassVar

from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its types are a package of their own

from peft_dynamic.functional.ranks import usual_ranks
from peft_dynamic.hosts.modes import adapters_disabled, evaluating
from peft_dynamic.reports.curve import Curve, direction, measured_samples
from peft_dynamic.rules import is_finite, is_int, is_number, plain
from peft_dynamic.tuners.dylora.budget import budget_ranks, parameters_in_use
from peft_dynamic.tuners.dylora.layer import ranked_layers
from peft_dynamic.tuners.dylora.model import active_ranked_adapter, at_rank, held
from peft_dynamic.tuners.dylora.weigh import weighed


@dataclass(frozen=True)
class RankRow:
    """The metrics at one rank, or under one budget.

    Attributes:
        rank: the rank of all modules; None for a budget, and for the base model without the adapter.
        metrics: name -> value, the mean where there is a value for each example.
        budget: what was given for it: a count of numbers, or a share; None where a rank was measured.
        parameters: how many numbers the factors have; None where no budgets were measured.
        samples: name -> the value of each example, for the metrics that have them.
    """

    rank: int | None
    metrics: dict[str, float]
    budget: int | float | None = None
    parameters: int | None = None
    samples: dict[str, list[float]] = field(default_factory=dict, repr=False)

    @property
    def is_base(self) -> bool:
        """Whether it is the base model without the adapter."""
        return self.rank is None and self.budget is None

    def standard_error(self, metric: str) -> float | None:
        """Of the mean over the examples; None for a metric that is one number."""
        values = self.samples.get(metric)
        return None if values is None or not all(map(math.isfinite, values)) else stdev(values) / math.sqrt(len(values))


@dataclass
class RankCurve(Curve[RankRow]):
    """Metrics of one adapter at several ranks or budgets, as `rank_curve` measures them.

    Args:
        rows: one `RankRow` per rank, increasing; the base model's, if it was measured, comes first.
    """

    kind: ClassVar[str] = "rank"
    row_class: ClassVar[type] = RankRow
    log_scale: ClassVar[bool] = True
    left_out_empty: ClassVar[tuple[str, ...]] = ("budget", "parameters", "samples")

    rows: list[RankRow] = field(default_factory=list)

    @property
    def over_budgets(self) -> bool:
        """Whether budgets were measured, so that the x axis has parameters."""
        return any(row.budget is not None for row in self.rows)

    def settings(self, row: RankRow) -> dict[str, str]:
        if not self.over_budgets:
            return {"rank": "base" if row.is_base else str(row.rank)}
        named = "base" if row.is_base else f"budget {row.budget}" if row.rank is None else str(row.rank)
        return {"rank": named, "parameters": f"{row.parameters:,}" if row.parameters else ""}

    def position(self, row: RankRow) -> int | None:
        return None if row.is_base else row.parameters if self.over_budgets else row.rank

    def series(self, row: RankRow) -> str:
        if row.is_base:
            return "base model"
        return "adapter" if not self.over_budgets else "one rank" if row.budget is None else "rank per module"

    @property
    def axis_label(self) -> str:
        return "parameters" if self.over_budgets else self.kind

    def tick(self, at: int) -> str:
        if not self.over_budgets or at < 1000:
            return str(at)
        return f"{at / 1e6:.3g}M" if at >= 1e6 else f"{at / 1e3:.3g}k"

    def named(self, row: RankRow) -> str:
        return f": {_named(row)}" if self.over_budgets else ""

    def interval(self, row: RankRow, metric: str) -> float | None:
        """Of what differs between the rows: how hard an example is, is taken out (Cousineau 2005, Morey 2008)."""
        tables = [each.samples.get(metric, []) for each in self.rows if not each.is_base]
        own = row.samples.get(metric, [])
        alike = len({len(table) for table in tables}) == 1 and all(math.isfinite(x) for table in tables for x in table)
        if row.is_base or not own or len(tables) < 2 or not alike:
            return None
        centred = [value - mean(others) for value, *others in zip(own, *tables, strict=True)]
        return 1.96 * stdev(centred) / math.sqrt(len(own)) * math.sqrt(len(tables) / (len(tables) - 1))

    def choice(self, metric: str, tolerance: float) -> RankRow | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.recommended_row(tolerance, metric)
        except ValueError:  # of a metric whose direction is not known, or that is nowhere finite
            return None

    @property
    def ranks(self) -> list[int]:
        """The ranks that were measured."""
        return [row.rank for row in self.rows if row.rank is not None]

    def __getitem__(self, rank: int | None) -> dict[str, float]:
        """The metrics at a rank; `curve[None]` is the base model's."""
        for row in self.rows:
            if row.rank == rank and row.budget is None:
                return row.metrics
        raise KeyError(f"rank {rank} was not measured; there are {[row.rank for row in self.rows]}")

    def aurac(self, metric: str | None = None) -> float:
        """The area under the metric over log2 of the rank, over the width: the mean height of the curve.

        The figure of MatryoshkaLoRA (arXiv 2605.07850, the authors' second version of it), by trapezoids.

        Args:
            metric: which metric; None for the first that `evaluate` gave.

        Raises:
            ValueError: the metric was not measured or is not finite at a rank, or there are fewer than two ranks.
        """
        name = (self.metrics or [""])[0] if metric is None else metric
        rows = sorted((row for row in self.rows if row.rank is not None), key=lambda row: row.rank or 0)
        values = [row.metrics.get(name, math.nan) for row in rows]
        if len(rows) < 2 or not all(map(math.isfinite, values)):
            raise ValueError(
                f"metric={name!r}: the area needs a finite value at two ranks or more, got "
                f"{dict(zip(self.ranks, values, strict=True))}."
            )
        places = [math.log2(row.rank or 1) for row in rows]
        steps = zip(places, places[1:], values, values[1:], strict=False)
        return sum((to - at) * (one + other) / 2 for at, to, one, other in steps) / (places[-1] - places[0])

    def recommend(
        self,
        tolerance: float = 0.01,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        standard_errors: float = 1.0,
    ) -> int:
        """The smallest rank that keeps all but a fraction of the best rank's gain over the base model.

        With g the gains over the base model and g* the greatest, a rank qualifies if g >= (1 - tolerance) g*: a rank
        that learnt little is told from one that learnt nothing, whatever the metric's size. Where the base model was
        not measured, with v* the best value, a rank qualifies if |v - v*| <= tolerance * |v*|. Ranks whose value is
        not finite never qualify.

        Where `evaluate` gave a value for each example, a rank qualifies too if it is behind the best one by at most
        `standard_errors` of the paired difference: what these examples cannot tell apart is no reason for a larger
        rank (the rule of one standard error: Breiman et al., Classification and Regression Trees, 1984).

        Where no rank is better than the base model, a warning says that nothing was learnt, and the values decide.

        Args:
            tolerance: which fraction may be lost: 0.01 is one per cent.
            metric: which metric; None for the first that `evaluate` gave.
            greater_is_better: the direction; None looks it up for names such as loss, perplexity, accuracy, f1 or bleu.
            standard_errors: how many may be lost, where they are known; 0 for none.

        Returns:
            The rank; of a curve over budgets alone, the number of parameters, which `budget_ranks` and `resize_adapter`
            take.

        Raises:
            ValueError: the tolerance is negative, the metric was not measured or is finite at no rank, or its direction
                is not known.
        """
        row = self.recommended_row(tolerance, metric, greater_is_better, standard_errors)
        return row.rank if row.rank is not None else row.parameters or 1

    def recommended_row(
        self,
        tolerance: float = 0.01,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        standard_errors: float = 1.0,
    ) -> RankRow:
        """The row of what `recommend` chooses: among the ranks, or among the budgets where there are no ranks."""
        if not (is_number(standard_errors) and is_finite(standard_errors) and standard_errors >= 0):
            raise ValueError(f"standard_errors={standard_errors!r}: must be a number of at least 0.")
        rows = [row for row in self.rows if row.rank is not None] or [row for row in self.rows if not row.is_base]
        good = self.good_rows(tolerance, metric, greater_is_better, rows)
        name = self.metrics[0] if metric is None else metric
        sign = 1 if (direction(name) if greater_is_better is None else greater_is_better) else -1
        finite = [row for row in rows if math.isfinite(row.metrics.get(name, math.nan))]
        best = max(finite, key=lambda row: sign * row.metrics[name])
        base = next((row.metrics.get(name, math.nan) for row in self.rows if row.is_base), math.nan)
        most = sign * (best.metrics[name] - base)
        if most > 0:
            good = [row for row in finite if sign * (row.metrics[name] - base) >= (1 - tolerance) * most]
        elif math.isfinite(most):
            warnings.warn(
                f"no rank is better than the base model: nothing was learnt, and {_named(good[0])} is no use. Train "
                "longer, or at another learning rate.",
                stacklevel=3,
            )
        good += [
            row
            for row in finite
            if _behind(row, best, name, sign) <= standard_errors
            and not (most > 0 and sign * (row.metrics[name] - base) <= 0)  # a noisy rank that learnt nothing
        ]
        return min(good, key=lambda row: row.rank if row.rank is not None else row.parameters or 0)

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
        base = next((row.metrics.get(name, math.nan) for row in self.rows if row.is_base), math.nan)
        sign = 1 if (direction(name) if greater_is_better is None else greater_is_better) else -1
        gains = {row.rank: sign * (row.metrics.get(name, math.nan) - base) for row in self.rows if row.rank is not None}
        return {rank: gain for rank, gain in gains.items() if math.isfinite(gain)}


def _named(row: RankRow) -> str:
    return f"rank {row.rank}" if row.rank is not None else f"budget {row.budget}"


def _behind(row: RankRow, best: RankRow, metric: str, sign: int) -> float:
    """By how many standard errors of the paired difference; infinite where the examples are not known."""
    own, other = row.samples.get(metric, []), best.samples.get(metric, [])
    if not own or len(own) != len(other) or not all(map(math.isfinite, [*own, *other])):
        return math.inf
    differences = [sign * (b - a) for a, b in zip(own, other, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences))
    behind = mean(differences)
    return behind / error if error else (0.0 if behind == 0 else math.inf)


def rank_curve(
    model: nn.Module,
    evaluate: Callable[[Any], Mapping[str, Any]],
    ranks: Sequence[int] | None = None,
    adapter_name: str | None = None,
    base: bool = True,
    progress: bool = True,
    on_row: Callable[[RankCurve], object] | None = None,
    *,
    budgets: Sequence[int | float] | None = None,
    moments: Any = None,
    damping: float = 0.1,
    cut: str = "auto",
) -> RankCurve:
    """Evaluate an adapter at each of its ranks, or under budgets that all its modules share.

    `evaluate` runs in eval mode and without gradients; each module's mode, the rank and the parameters' `requires_grad`
    are afterwards what they were, also after an error. A stock LoRA adapter is cut to its leading singular components
    for the while; its factors are not touched.

        curve = rank_curve(model, lambda model: {"loss": my_loss(model)})
        print(curve.table(), curve.recommend(tolerance=0.01))

    Args:
        model: a `PeftModel`, or a transformers model with an adapter added by `add_adapter` or `load_adapter`: of
            DyLoRA, or a stock LoRA.
        evaluate: called as `evaluate(model)` once per rank; returns a dict from metric name to number, or to a list
            with a number for each example, from which `recommend` knows the standard errors.
        ranks: the ranks to measure, in any order; None for those that were trained, of a stock LoRA the powers of two
            and its own; with `budgets` None for none.
        adapter_name: the adapter whose rank varies; None for the first active one. Others stay at their rank.
        base: also measure the base model, with all adapters disabled. Left out, with a warning, for an adapter that
            trained the base model's own biases, which cannot be switched off.
        progress: show a progress bar.
        on_row: called after each row with the curve so far, e.g. to write it down.
        budgets: budgets to measure, each a count of numbers, or a float for a share of the adapter's, with the ranks
            per module of `budget_ranks`.
        moments: an `AdapterMoments` of the adapter, to cut by what it measured; None for the weights alone, or for what
            `calibrate` has put into a DyLoRA adapter.
        damping: as in `resize_adapter`.
        cut: as in `resize_adapter`; "plain" also for an adapter that was calibrated.

    Returns:
        The `RankCurve`, the base model first and the ranks increasing.

    Raises:
        TypeError: `evaluate` returned something else than a dict of numbers.
        ValueError: the model has no such adapter, the adapters are disabled or merged, or a rank is out of range.
    """
    name = active_ranked_adapter(model, adapter_name)
    with held(model, [name]), weighed(model, name, moments, damping, cut):
        settings = _settings(model, name, ranks, budgets)
        configs: Any = model.peft_config
        bias = getattr(configs[name], "bias", "none")
        if base and bias != "none":
            base = False
            warnings.warn(
                f"the adapter {name!r} trained biases of the base model (bias={bias!r}), which cannot be switched off: "
                "the curve has no row for the base model.",
                stacklevel=2,
            )
        rows: list[RankRow] = []

        def add(row: RankRow) -> None:
            bar.set_postfix_str("base model" if row.is_base else _named(row))
            metrics, samples = measured_samples(evaluate, model)
            rows.insert(0 if row.is_base else len(rows), replace(row, metrics=metrics, samples=samples))
            bar.update()
            if on_row is not None:
                on_row(RankCurve(list(rows)))

        with evaluating(model), tqdm(total=len(settings) + base, desc="rank curve", disable=not progress) as bar:
            for row, rank in settings:
                with at_rank(model, rank, name):
                    add(replace(row, parameters=parameters_in_use(model, name)) if budgets is not None else row)
            if base:
                with adapters_disabled(model):
                    add(RankRow(None, {}))
        return RankCurve(rows)


def _settings(
    model: Any, name: str, ranks: Sequence[int] | None, budgets: Sequence[int | float] | None
) -> list[tuple[RankRow, int | dict[str, int]]]:
    """What is to be measured: a row without metrics, and the rank for it. All checked, before hours of evaluation."""
    layers = [layer for _, layer in ranked_layers(model, name)]
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("the model's adapters are disabled, so every rank would be the base model. Enable them first.")
    if any(name not in layer.active_adapters for layer in layers):
        raise ValueError(
            f"adapter_name={name!r} is not active, so no rank of it would show. Call set_adapter({name!r})."
        )
    if ranks is None:
        ranks = () if budgets is not None else _usual_ranks(model.peft_config[name], layers, name)
    ranks = _listed("ranks", ranks, is_int, "ints from 1 on")
    budgets = _listed("budgets", () if budgets is None else budgets, is_number, "counts from 1 on, or shares as floats")
    wanted: list[tuple[RankRow, int | dict[str, int]]] = []
    for rank in sorted({plain(rank) for rank in ranks}):
        wanted.append((RankRow(rank, {}), rank))
    shares = {(isinstance(each, float), each): each for each in map(plain, budgets)}
    for budget in (shares[key] for key in sorted(shares, key=lambda key: (not key[0], key[1]))):
        wanted.append((RankRow(None, {}, budget=budget), budget_ranks(model, budget, name)))
    if not wanted:
        raise ValueError("ranks=[]: pass at least one rank or budget, or None for the trained ranks.")
    for _, rank in wanted:
        with at_rank(model, rank, name):
            pass
    return wanted


def _listed(name: str, values: Any, holds: Callable[[Any], bool], rule: str) -> list[Any]:
    listed = None if isinstance(values, str | Mapping) or not isinstance(values, Iterable) else [*values]
    if listed is None or not all(map(holds, listed)):
        raise TypeError(f"{name}={values!r}: must be a list of {rule}.")
    return listed


def _usual_ranks(config: Any, layers: list[Any], name: str) -> Sequence[int]:
    if hasattr(config, "trained_ranks"):
        return config.trained_ranks
    return usual_ranks(max(layer.lora_views[name].max_rank for layer in layers))
