"""The layers of DyLoRA: PEFT's own LoRA layers, whose factors are cut to the rank in use.

Notable: there is no copy of PEFT's layer classes. `lora_A` and `lora_B` become subclasses of what they are, whose
`weight` is the factor at the rank in use, and the layer's `r`, `lora_alpha` and `scaling` follow.
At rank b a layer thus *is* a stock LoRA layer of rank b for everything in PEFT that reads it: forward, merge, unmerge,
`get_delta_weight`, mixed batches, on every backend whose LoRA layer calls `lora_A` and `lora_B`. The whole matrices
stay where the optimizer, `state_dict` and FSDP look for them, in `_parameters`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import nn

from peft_dynamic.functional.ranks import alpha_at, leading_components

from .config import DyLoRAConfig
from .factors import RANKED_CLASSES, RankedParameterDict, RankView, whole_factor
from .schedule import LIVE_RANKS, RankSchedule


def is_sharded(factor: torch.Tensor) -> bool:
    """Whether FSDP2 holds the factor in parts at the moment."""
    return hasattr(factor, "placements")


class AdapterRanks:
    """The rank state of one adapter in one layer.

    Attributes:
        max_rank: r of this layer: the config's, or its cap in `rank_pattern`.
        rank: the set rank, in use everywhere but in a training forward pass.
        asked: the rank that was asked for; above `rank` where the layer is capped.
    """

    def __init__(
        self,
        schedule: RankSchedule,
        truncation: str,
        rule: str,
        lora_alpha: float,
        max_rank: int,
        parts: tuple[tuple[nn.Module, str, RankView], tuple[nn.Module, str, RankView]],
    ) -> None:
        self.schedule = schedule
        self.truncation = truncation
        self.rule = rule
        self.lora_alpha = lora_alpha
        self.max_rank = max_rank
        self.parts = parts  # (module that holds the parameter, the parameter's name there, its view) for A and for B
        self.rank = self.asked = max_rank
        self.outside_training: tuple[int, float, Any] | None = None  # r, lora_alpha, scaling to go back to
        self._basis: tuple[torch.Tensor, torch.Tensor] | None = None
        self.basis_key: Any = None
        for _, _, view in parts:
            view.owner = self
        LIVE_RANKS.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget_basis()
        LIVE_RANKS.add(self)  # a deep copy or an unpickled one

    def factors(self) -> list[torch.Tensor]:
        """The whole A and B."""
        (holder_a, name_a, _), (holder_b, name_b, _) = self.parts
        return [whole_factor(holder_a, name_a), whole_factor(holder_b, name_b)]

    def basis(self) -> tuple[torch.Tensor, torch.Tensor]:
        """E and F of `leading_components` for the factors as they are now."""
        if self._basis is not None and torch.compiler.is_compiling():
            return self._basis  # kept up to date outside the graph: see prepare
        return self._current_basis()

    def state_key(self) -> tuple[int, ...]:
        """Changes whenever the factors do; the step counter is for optimizers that bypass torch's version counters."""
        a, b = self.factors()
        return (self.schedule.updates, id(a), a._version, id(b), b._version)

    @torch.compiler.disable
    def _current_basis(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.factors()
        key = self.state_key()
        if self._basis is None or key != self.basis_key:
            if is_sharded(a) or is_sharded(b):
                raise RuntimeError(
                    "truncation='svd' needs both factors of a layer at once, and FSDP has gathered one of them only: "
                    "wrap whole transformer blocks, not single linear layers, or use truncation='prefix'."
                )
            (_, _, view_a), (_, _, view_b) = self.parts
            self._basis = leading_components(view_a.matrices(a), view_b.matrices(b))
            self.basis_key = key
        return self._basis

    def forget_basis(self) -> None:
        """The factors have changed."""
        self._basis = self.basis_key = None
        for _, _, view in self.parts:
            view.kept = None

    def prepare(self, rank: int) -> None:
        """Make the basis for `rank` anew, after an optimizer step for one: a compiled forward pass cannot."""
        self.forget_basis()
        at_hand = not any(is_sharded(factor) or factor.device.type == "meta" for factor in self.factors())
        if self.truncation == "svd" and rank < self.max_rank and at_hand:
            self._current_basis()

    def is_trained(self) -> bool:
        a, b = self.factors()
        return a.requires_grad or b.requires_grad

    def moving_parts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each factor with the mask of the components that this step trains under update="frozen"."""
        stop = min(self.schedule.drawn, self.max_rank)
        start = min(self.schedule.below(self.schedule.drawn), self.max_rank)
        return [
            (factor, view.block_mask(factor, start, stop))
            for factor, (_, _, view) in zip(self.factors(), self.parts, strict=True)
        ]


def make_ranked(layer: LoraLayer, adapter_name: str, schedule: RankSchedule, config: DyLoRAConfig) -> None:
    """Turn the adapter's factors in a LoRA layer into ranked ones, at full rank.

    Raises:
        ValueError: the layer's backend keeps its factors in modules that cannot be sliced, or a grouped convolution
            cannot split a rank.
    """
    max_rank = layer.r[adapter_name]
    groups_a, groups_b, divisor = (1, 1), (1, 1), 1
    base_layer = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        groups_a, groups_b = (layer.num_experts, 1), (1, layer.num_experts)
    elif getattr(base_layer, "groups", 1) > 1:
        divisor = base_layer.groups
        groups_a = (divisor, 1)
        indivisible = [min(rank, max_rank) for rank in schedule.ranks if min(rank, max_rank) % divisor]
        if indivisible:
            raise ValueError(
                f"DyLoRA cannot use the ranks {indivisible} on {type(base_layer).__name__} with groups={divisor}: each "
                f"group takes an equal part of the rank. Pass ranks divisible by {divisor}, or leave the layer out."
            )
    view_a = RankView(0, max_rank, groups_a, divisor)
    view_b = RankView(1, max_rank, groups_b, divisor)
    if adapter_name in layer.lora_A:
        modules = (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
        for module, view in zip(modules, (view_a, view_b), strict=True):
            ranked = RANKED_CLASSES.get(type(module))
            if ranked is None or getattr(base_layer, "_hf_tp_plan", None) is not None:
                raise ValueError(
                    f"DyLoRA does not support {type(layer).__name__} over {type(base_layer).__name__}: its LoRA "
                    f"factors are {type(module).__name__} modules, possibly sharded, which cannot be cut to a rank. "
                    "Leave the layer out of target_modules."
                )
            module.rank_view = view
            module.__class__ = ranked
        parts = ((modules[0], "weight", view_a), (modules[1], "weight", view_b))
    else:
        dicts = (layer.lora_embedding_A, layer.lora_embedding_B)
        for factors, view in zip(dicts, (view_a, view_b), strict=True):
            if not isinstance(factors, RankedParameterDict):
                factors.rank_views = {}
                factors.__class__ = RankedParameterDict
            factors.rank_views[adapter_name] = view
        parts = ((dicts[0], adapter_name, view_a), (dicts[1], adapter_name, view_b))
    if not hasattr(layer, "lora_ranks"):
        layer.lora_ranks = {}
        layer.other_param_names = (*layer.other_param_names, "lora_ranks")
        cls: Any = type(layer)
        layer.__class__ = ranked_layer_class(cls)
    layer.lora_ranks[adapter_name] = AdapterRanks(
        schedule, config.truncation, config.scaling, layer.lora_alpha[adapter_name], max_rank, parts
    )
    layer.lora_ranks[adapter_name].prepare(schedule.drawn)
    _show(layer, adapter_name, max_rank)
    _set_scaling(layer, adapter_name, layer.lora_alpha[adapter_name] / layer.r[adapter_name])


def set_layer_rank(layer: LoraLayer, adapter_name: str, asked: int) -> None:
    """Use rank `asked`, or the layer's cap if smaller, outside training. A factor set by `scale_layer` stays."""
    ranks: AdapterRanks = layer.lora_ranks[adapter_name]
    if adapter_name in layer.merged_adapters:
        raise ValueError(
            f"the adapter {adapter_name!r} is merged at rank {ranks.rank}, so its rank cannot change to {asked}: "
            "unmerging would take out another update than was put in. Call unmerge_adapter() first."
        )
    factors = layer.lora_A if adapter_name in layer.lora_A else layer.lora_embedding_A
    intact = factors if isinstance(factors, RankedParameterDict) else factors[adapter_name]
    if intact is not ranks.parts[0][0]:
        raise ValueError(
            f"the factors of the adapter {adapter_name!r} were replaced (prepare_model_for_compiled_hotswap pads "
            "them), so its rank can no longer change. Set the rank before, or export it with export_lora."
        )
    multiplier = layer.scaling[adapter_name] / (layer.lora_alpha[adapter_name] / layer.r[adapter_name])
    ranks.asked, ranks.rank = asked, min(asked, ranks.max_rank)
    ranks.prepare(ranks.rank)
    _show(layer, adapter_name, ranks.rank)
    scale = layer.lora_alpha[adapter_name] / ranks.rank
    _set_scaling(layer, adapter_name, scale if multiplier == 1 else scale * float(multiplier))


def _show(layer: LoraLayer, adapter_name: str, rank: int, frozen_below: int = 0) -> None:
    ranks: AdapterRanks = layer.lora_ranks[adapter_name]
    for _, _, view in ranks.parts:
        view.show(rank, frozen_below)
    layer.r[adapter_name] = rank
    layer.lora_alpha[adapter_name] = alpha_at(ranks.rule, ranks.lora_alpha, rank, ranks.max_rank)


def _set_scaling(layer: LoraLayer, adapter_name: str, value: float) -> None:
    if isinstance(layer.scaling[adapter_name], torch.Tensor):  # after prepare_model_for_compiled_hotswap
        layer.scaling[adapter_name].fill_(value)
    else:
        layer.scaling[adapter_name] = value


class RankedLayer:
    """Mixed into PEFT's LoRA layer classes: the drawn rank holds while the layer trains.

    Per layer rather than for the whole model, since gradient checkpointing calls the layers again in the backward pass,
    when the model's own forward pass is over.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training or self.merged:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        _enter_training_rank(self)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _leave_training_rank(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, which pickle and deepcopy cannot find by name; its base can be.
        return _empty_ranked_layer, (type(self).__mro__[2],), self.__dict__


def _empty_ranked_layer(base: type) -> Any:
    return object.__new__(ranked_layer_class(base))


@cache
def ranked_layer_class(base: type) -> type:
    """`base` with `RankedLayer` in front; under the same name, by which PEFT looks for some of its classes."""
    return types.new_class(base.__name__, (RankedLayer, base), exec_body=lambda body: body.update(__module__=__name__))


def _layers_of(layer: LoraLayer) -> tuple[LoraLayer, ...]:
    # MultiheadAttention computes with its out_proj's factors without calling out_proj.
    return (layer, layer.get_base_layer().out_proj) if isinstance(layer, MultiheadAttention) else (layer,)


def _enter_training_rank(layer: LoraLayer) -> None:
    for part in _layers_of(layer):
        for name, ranks in part.lora_ranks.items():
            schedule = ranks.schedule
            if schedule.suspended or not ranks.is_trained():
                continue
            ranks.outside_training = (part.r[name], part.lora_alpha[name], part.scaling[name])
            multiplier = part.scaling[name] / (part.lora_alpha[name] / part.r[name])
            rank = min(schedule.drawn, ranks.max_rank)
            frozen = min(schedule.below(schedule.drawn), rank) if schedule.update == "frozen" else 0
            _show(part, name, rank, frozen)
            scale = part.lora_alpha[name] / rank
            part.scaling[name] = scale if multiplier == 1 else scale * multiplier


def _leave_training_rank(layer: LoraLayer) -> None:
    for part in _layers_of(layer):
        for name, ranks in part.lora_ranks.items():
            if ranks.outside_training is not None:
                for _, _, view in ranks.parts:
                    view.show(ranks.rank)
                part.r[name], part.lora_alpha[name], part.scaling[name] = ranks.outside_training
                ranks.outside_training = None


def ranked_layers(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, Any]]:
    """(name, layer) of each layer of `model` with the DyLoRA adapter, or with any."""
    for name, module in model.named_modules():
        names = getattr(module, "lora_ranks", {})
        if names and (adapter_name is None or adapter_name in names):
            yield name, module
