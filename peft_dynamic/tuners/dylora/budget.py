"""Ranks per module for one budget of an adapter in a model."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import nn

from peft_dynamic.functional.products import allocate, nothing_left, spectrum
from peft_dynamic.rules import is_finite, is_int, is_number, plain
from peft_dynamic.tuners.checkpoint import PREFIX
from peft_dynamic.tuners.dylora.layer import ranked_layers
from peft_dynamic.tuners.dylora.model import active_ranked_adapter, held
from peft_dynamic.tuners.dylora.ranks import AdapterRanks, check_finite
from peft_dynamic.tuners.dylora.weigh import check_svd


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
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    name = active_ranked_adapter(model, adapter_name)
    with held(model, [name]):
        layers: dict[str, Any] = dict(ranked_layers(model, name))
        states: dict[str, AdapterRanks] = {key: layer.lora_views[name] for key, layer in layers.items()}
        check_svd(states, name, "a budget")
        values: dict[str, list[float]] = {}
        costs: dict[str, int] = {}
        groups = {group[0]: group for group in _kept_together(layers)}
        for first, group in groups.items():
            rows = [_worth(layers[key], name, states[key]) for key in group]
            values[first] = torch.stack(rows).sum(0).sqrt().tolist()
            size = sum(factor.numel() for key in group for factor in states[key].factors())
            costs[first] = size // len(values[first])
        whole = sum(costs[key] * len(values[key]) for key in costs)
        numbers = numbers_of_budget(parameters, whole)
        taken = allocate(values, costs, numbers)
        if not any(taken.values()):
            raise ValueError(nothing_left(values, costs, parameters, "parameters"))
        return {
            exactly(key): taken[first] * states[key].parts[0][2].divisor
            for first, group in groups.items()
            for key in group
        }


def _worth(layer: Any, adapter_name: str, state: AdapterRanks) -> torch.Tensor:
    """Of each step of the layer's rank, largest first: (s sigma)^2, of all its experts or groups together."""
    check_finite(state, *state.plain_grams())
    sigma = spectrum(*state.grams()).square().sum(0).cpu()
    steps = state.max_rank // (state.per_rank * state.parts[0][2].divisor)
    scale = float(layer.scaling[adapter_name])
    return scale**2 * sigma[: steps * state.per_rank].view(-1, state.per_rank).sum(1)


def _kept_together(layers: dict[str, Any]) -> list[list[str]]:
    """The modules by what has one rank in a file: an attention and its projection, parameters of a module alike."""
    groups: dict[Any, list[str]] = {}
    owners = {
        id(layer.get_base_layer().out_proj): id(layer)
        for layer in layers.values()
        if isinstance(layer, MultiheadAttention)
    }
    for key, layer in layers.items():
        mark: Any = owners.get(id(layer), id(layer))
        if isinstance(layer, ParamWrapper):
            mark = (id(layer.get_base_layer()), *layer.r.values())
        groups.setdefault(mark, []).append(key)
    return list(groups.values())


def numbers_of_budget(parameters: int | float, whole: int) -> int:
    """A count, or a share of the whole, as a count.

    Raises:
        ValueError, TypeError: it is neither.
    """
    parameters = plain(parameters)
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
    """A pattern, as in `rank_pattern`, that matches this module alone, in a `PeftModel` and in what it wraps."""
    return rf"^({re.escape(PREFIX)})?" + re.escape(module.removeprefix(PREFIX))
