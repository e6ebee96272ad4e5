"""Cuts by what a calibration measured: its moments, in the place of the weights' own Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft_dynamic.functional.products import damped
from peft_dynamic.rules import is_finite, is_number
from peft_dynamic.tuners.dylora.layer import ranked_layers
from peft_dynamic.tuners.dylora.ranks import AdapterRanks, layers_of
from peft_dynamic.tuners.moments import AdapterMoments, factors_of


def check_cut(moments: Any, damping: float, cut: str) -> None:
    """Raise ValueError or TypeError for a cut that has no meaning, or needs other moments."""
    if cut not in ("auto", "plain", "inputs", "loss"):
        raise ValueError(f"cut={cut!r}: must be 'auto', 'plain', 'inputs' or 'loss'.")
    if not (is_number(damping) and is_finite(damping) and damping >= 0):
        raise (ValueError if is_number(damping) else TypeError)(f"damping={damping!r}: must be a number of at least 0.")
    if moments is not None and not isinstance(moments, AdapterMoments):
        raise TypeError(f"moments must be what adapter_moments gives, or None, got {type(moments).__name__}.")
    if cut in ("inputs", "loss") and (moments is None or (cut == "loss" and not moments.losses)):
        raise ValueError(f"cut={cut!r} needs moments" + (" with loss=True." if cut == "loss" else ": pass moments."))


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
        ValueError: they are of another adapter, or of this one before further training, or not finite.
    """
    check_cut(moments, damping, cut)
    layers = dict(ranked_layers(model, adapter_name))
    states = {key: layer.lora_views[adapter_name] for key, layer in layers.items()}
    check_svd(states, adapter_name, "a calibration")
    grams, names = {}, {}
    for key, state in states.items():
        a, b = factors_of(layers[key], adapter_name)
        named = next((name for name in (key, f"base_model.model.{key}") if name in moments.marks), key)
        if len(a) == state.max_rank and not moments.may_be_of(named, a, b):
            raise ValueError(
                f"moments: they were measured with other factors of {key}: of another adapter, or before it was "
                "trained on. Measure them of this adapter with adapter_moments."
            )
        by_loss = moments.losses and cut != "inputs"
        pair = (_of_module(moments.inputs, key, state), _of_module(moments.losses, key, state) if by_loss else None)
        names[state.order] = key.removeprefix("base_model.model.")
        plain = state.plain_grams()
        grams[state.order] = tuple(
            own if moment is None else damped(own, moment.to(own.device), damping)
            for own, moment in zip(plain, pair, strict=True)
        )
    schedule = next(iter(states.values())).schedule
    in_order = [state.order for state in layers_of(schedule)]
    schedule.keep_moments([grams[order] for order in in_order], [names[order] for order in in_order])
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
    """`weigh` inside a block, or with cut="plain" no moments; what was there before comes back after it."""
    check_cut(moments, damping, cut)
    if moments is None and cut == "auto":
        yield
        return
    states = [layer.lora_views[adapter_name] for _, layer in ranked_layers(model, adapter_name)]
    schedule = states[0].schedule
    before = schedule.moments, schedule.moments_step, schedule.moments_of
    try:
        if cut == "plain":
            schedule.keep_moments(None)
            for state in states:
                state.forget()
        else:
            weigh(model, adapter_name, moments, damping, cut)
        yield
    finally:
        schedule.moments, schedule.moments_step, schedule.moments_of = before
        for state in states:
            state.forget()
