"""The exit curve: what each depth of a model is worth and how fast it is, for one or several settings of the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its types are a package of their own

from peft_dynamic.exits.layers import check_exit, check_exits_work, depth_of, evenly_spaced, exit_at
from peft_dynamic.hosts.blocks import base_model
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.reports.curve import Curve, measured

LATENCY = "ms_per_token"
_WARM_UP = 1  # rounds of timing that do not count


@dataclass(frozen=True)
class ExitRow:
    """The metrics at one exit.

    Attributes:
        exit: after how many layers.
        metrics: name -> value.
        variant: the setting of the model; None where there was one alone.
    """

    exit: int
    metrics: dict[str, float]
    variant: str | None = None


@dataclass
class ExitCurve(Curve[ExitRow]):
    """Metrics of one model at several exits, and under several settings, as `exit_curve` measures them.

    Args:
        rows: one `ExitRow` per exit and setting.
    """

    kind: ClassVar[str] = "exit"
    row_class: ClassVar[type] = ExitRow

    rows: list[ExitRow] = field(default_factory=list)

    def settings(self, row: ExitRow) -> dict[str, str]:
        named = {} if all(each.variant is None for each in self.rows) else {"variant": row.variant or ""}
        return {"exit": str(row.exit), **named}

    def position(self, row: ExitRow) -> int:
        return row.exit

    def series(self, row: ExitRow) -> str:
        return row.variant or "model"

    @property
    def exits(self) -> list[int]:
        """The exits that were measured."""
        return self.positions

    def __getitem__(self, key: int | tuple[int, str]) -> dict[str, float]:
        """The metrics at an exit, or at an exit under a setting: `curve[12]`, `curve[12, "rank 4"]`."""
        exit, variant = key if isinstance(key, tuple) else (key, None)
        for row in self.rows:
            if row.exit == exit and row.variant == variant:
                return row.metrics
        raise KeyError(f"{key!r} was not measured; there are {[(row.exit, row.variant) for row in self.rows]}")

    def recommend(
        self, tolerance: float = 0.01, metric: str | None = None, greater_is_better: bool | None = None
    ) -> ExitRow:
        """The row of the smallest exit whose metric is within a relative tolerance of the best row's.

        With v* the best value, a row qualifies if |v - v*| <= tolerance * |v*|; never one whose value is not finite. Of
        several settings at that exit it is the one that was measured first: name the cheapest first.

        Args:
            tolerance: how much worse than the best is still good enough, as a fraction: 0.01 is one per cent.
            metric: which metric; None for the first that `evaluate` gave.
            greater_is_better: the direction; None looks it up for names such as loss, perplexity, accuracy, f1 or bleu.

        Returns:
            The row; `.exit` is what `exit_at` and `truncate_to_exit` take.

        Raises:
            ValueError: the tolerance is negative, the metric was not measured or is nowhere finite, or its direction
                is not known.
        """
        return min(self.good_rows(tolerance, metric, greater_is_better, self.rows), key=lambda row: row.exit)


def exit_curve(
    model: Any,
    evaluate: Callable[[Any], dict[str, float]],
    exits: Sequence[int] | None = None,
    variants: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    latency_tokens: int = 0,
    latency_prompt: torch.Tensor | None = None,
    latency_rounds: int = 3,
    progress: bool = True,
) -> ExitCurve:
    """Evaluate a model at each of its exits, and time it there.

    `evaluate` runs in eval mode and without gradients. Modes, configuration and settings are afterwards what they were,
    also after an error.

    Depth x rank, for a DyLoRA adapter: `variants={f"rank {r}": partial(model.at_rank, r) for r in (2, 8, 32)}`.

    Args:
        model: a causal language model of transformers, or a `PeftModel` over one.
        evaluate: called as `evaluate(model)` once per exit and setting; returns a dict from metric name to number.
        exits: the exits to measure, in any order; None for the trainer's default, eight from 3/10 of the depth to all.
        variants: name -> function that returns a context manager, in which the model has that setting; None for the
            model as it is.
        latency_tokens: also measure `ms_per_token`, the time for one token of greedy generation with a cache, by
            generating so many; 0 for no timing.
        latency_prompt: (B, T) prompt for the timing, without padding; None for 16 tokens.
        latency_rounds: the exits are timed in turn, so many times, and the median counts.
        progress: show a progress bar.

    Returns:
        The `ExitCurve`, exits increasing within each setting.

    Raises:
        TypeError: `evaluate` returned something else than a dict of numbers, or an exit is no whole number.
        ValueError: there is no such exit, or the architecture cannot be left early.
    """
    depth = depth_of(model)
    wanted = sorted(set(evenly_spaced(8, depth) if exits is None else exits))
    for exit in wanted:  # before hours of evaluation, not after some of it
        check_exit(model, exit, "exits: exit")
    if not wanted:
        raise ValueError("exits=[]: pass at least one exit, or None for the trainer's default.")
    if variants is not None and not variants:
        raise ValueError("variants={}: name at least one setting, or pass None for the model as it is.")
    for name, value, least in (("latency_tokens", latency_tokens, 0), ("latency_rounds", latency_rounds, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}.")
    check_exits_work(model)
    settings: list[tuple[str | None, Callable[[], AbstractContextManager[Any]]]] = (
        [(None, nullcontext)] if variants is None else [*variants.items()]
    )
    rows = []
    bar = tqdm(total=len(wanted) * len(settings), desc="exit curve", disable=not progress)
    with bar, evaluating(model):
        for variant, setting in settings:
            with setting():
                times = _latencies(model, wanted, latency_tokens, latency_prompt, latency_rounds)
                for exit in wanted:
                    bar.set_postfix_str(f"exit {exit}" + (f", {variant}" if variant else ""))
                    with exit_at(model, exit):
                        metrics = measured(evaluate, model)
                    rows.append(ExitRow(exit, {**metrics, **times.get(exit, {})}, variant))
                    bar.update()
    return ExitCurve(rows)


def _latencies(
    model: Any, exits: list[int], count: int, prompt: torch.Tensor | None, rounds: int
) -> dict[int, dict[str, float]]:
    """Median over the rounds; each round times all exits, since a machine's speed changes with time."""
    if not count:
        return {}
    device = base_model(model).get_input_embeddings().weight.device
    ids = torch.arange(1, 17)[None] if prompt is None else prompt
    ids = ids.to(device)
    taken: dict[int, list[float]] = {exit: [] for exit in exits}
    for turn in range(rounds + _WARM_UP):
        for exit in exits:
            with exit_at(model, exit):
                _wait(device)
                start = time.perf_counter()
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=count,
                    min_new_tokens=count,
                    do_sample=False,
                )
                _wait(device)
            if turn >= _WARM_UP:
                taken[exit].append(1000 * (time.perf_counter() - start) / count)
    return {exit: {LATENCY: sorted(times)[len(times) // 2]} for exit, times in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
