"""Ranks per module for one budget, and cuts by what a calibration measured, of an adapter in a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft_dynamic.functional.products import allocate, damped, spectrum
from peft_dynamic.rules import is_finite, is_int, is_number
from peft_dynamic.tuners.dylora.layer import ranked_layers
from peft_dynamic.tuners.dylora.model import active_ranked_adapter, held
from peft_dynamic.tuners.dylora.ranks import AdapterRanks, layers_of


def budget_ranks(model: nn.Module, parameters: int | float, adapter_name: str | None = None) -> dict[str, int]:
    """The rank of each module for one budget of numbers: what `set_rank` and `at_rank` take.

    Components of all modules are taken by squared singular value over size until the first that does not fit, as by
    `resize_adapter`, so that those of a smaller budget are among those of a larger one. A module may get rank 0.

    Args:
        model: with a LoRA adapter, or a DyLoRA adapter of truncation="svd".
        parameters: how many numbers A and B may have together; a share of those that there are, if it is a float.
        adapter_name: the adapter; None for the first active one.

    Returns:
        A pattern that matches the module alone -> its rank.

    Raises:
        ValueError, TypeError: the budget has no meaning, or the adapter is cut to its first components.
    """
    name = active_ranked_adapter(model, adapter_name)
    with held(model, [name]):
        layers: dict[str, Any] = dict(ranked_layers(model, name))
        states: dict[str, AdapterRanks] = {key: layer.lora_views[name] for key, layer in layers.items()}
        check_svd(states, name, "a budget")
        values, costs = {}, {}
        for key, state in states.items():
            unit = state.per_rank * state.parts[0][2].divisor
            sigma = spectrum(*state.grams()).square().sum(0)[: state.max_rank // unit * state.per_rank]
            scale = float(layers[key].scaling[name])
            values[key] = (abs(scale) * sigma.view(-1, state.per_rank).sum(1).sqrt()).tolist()
            costs[key] = sum(factor.numel() for factor in state.factors()) // len(values[key])
        whole = sum(costs[key] * len(values[key]) for key in costs)
        taken = allocate(values, costs, numbers_of_budget(parameters, whole))
        return {exactly(key): steps * states[key].parts[0][2].divisor for key, steps in taken.items()}


def numbers_of_budget(parameters: int | float, whole: int) -> int:
    """A count, or a share of the whole, as a count.

    Raises:
        ValueError, TypeError: it is neither.
    """
    if isinstance(parameters, float) and is_finite(parameters) and 0 < parameters <= 1:
        return int(parameters * whole)
    if is_int(parameters) and parameters >= 1:
        return int(parameters)
    raise (ValueError if is_number(parameters) else TypeError)(
        f"parameters={parameters!r}: must be a count of at least 1, or a share as a float above 0 and up to 1.0."
    )


def parameters_in_use(model: nn.Module, adapter_name: str) -> int:
    """How many numbers A and B have at the rank in use, in all modules."""
    total = 0
    for _, layer in ranked_layers(model, adapter_name):
        state: AdapterRanks = layer.lora_views[adapter_name]
        total += sum(factor.numel() for factor in state.factors()) * state.rank // state.max_rank
    return total


def exactly(module: str) -> str:
    """A pattern, as in `rank_pattern`, that matches this module alone."""
    return "^" + module.replace(".", r"\.")


def check_svd(states: Mapping[str, AdapterRanks], adapter_name: str, what: str) -> None:
    """Raise ValueError for an adapter of truncation="prefix", whose ranks keep the first components."""
    if any(state.truncation != "svd" for state in states.values()):
        raise ValueError(
            f"the adapter {adapter_name!r} has truncation='prefix': a rank keeps its first components, and {what} has "
            "none to choose from. Train with truncation='svd'."
        )


def weigh(model: nn.Module, adapter_name: str, moments: Any, damping: float = 0.1, cut: str = "auto") -> None:
    """Cut the adapter by measured moments from now on, until it is trained further.

    Args:
        model: whose layers are ranked.
        adapter_name: the adapter.
        moments: an `AdapterMoments` of this adapter at its full rank.
        damping: how much of the plain cut is in it, see `functional.products.damped`.
        cut: "inputs", "loss", or "auto" for what the moments have.

    Raises:
        ValueError: they are of another adapter, or not finite.
    """
    if cut not in ("auto", "inputs", "loss"):
        raise ValueError(f"cut={cut!r}: must be 'auto', 'inputs' or 'loss' with moments.")
    if not (is_number(damping) and is_finite(damping) and damping >= 0):
        raise ValueError(f"damping={damping!r}: must be a number of at least 0.")
    if cut == "loss" and not moments.losses:
        raise ValueError("cut='loss' needs moments with loss=True.")
    layers = dict(ranked_layers(model, adapter_name))
    states = {key: layer.lora_views[adapter_name] for key, layer in layers.items()}
    check_svd(states, adapter_name, "a calibration")
    grams = {}
    for key, state in states.items():
        by_loss = moments.losses and cut != "inputs"
        pair = (_of_module(moments.inputs, key, state), _of_module(moments.losses, key, state) if by_loss else None)
        plain = state.plain_grams()
        grams[state.order] = tuple(
            own if moment is None else damped(own, moment.to(own.device), damping)
            for own, moment in zip(plain, pair, strict=True)
        )
    schedule = next(iter(states.values())).schedule
    schedule.keep_moments([grams[state.order] for state in layers_of(schedule)])
    for state in states.values():
        state.forget()


def _of_module(moments: Mapping[str, torch.Tensor], module: str, state: AdapterRanks) -> torch.Tensor:
    found = moments.get(module, moments.get(f"base_model.model.{module}"))
    if found is None or found.numel() != state.gram_shape.numel():
        raise ValueError(
            f"moments: they are of another adapter, and have none of rank {state.max_rank} for {module}. Measure them "
            "of this adapter with adapter_moments, at its full rank."
        )
    if not found.isfinite().all():
        raise ValueError(f"moments: those of {module} are not finite. Measure again, without the batch that did it.")
    return found.double().view(state.gram_shape)


@contextmanager
def weighed(model: nn.Module, adapter_name: str, moments: Any, damping: float, cut: str) -> Iterator[None]:
    """`weigh` inside a block; what was there before comes back after it. Without moments nothing changes."""
    if moments is None:
        yield
        return
    states = [layer.lora_views[adapter_name] for _, layer in ranked_layers(model, adapter_name)]
    schedule = states[0].schedule
    before = schedule.moments, schedule.moments_step
    try:
        weigh(model, adapter_name, moments, damping, cut)
        yield
    finally:
        schedule.moments, schedule.moments_step = before
        for state in states:
            state.forget()
