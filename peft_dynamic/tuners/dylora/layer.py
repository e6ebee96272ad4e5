"""The layers of DyLoRA: PEFT's own LoRA layers, whose factors are cut to the rank in use.

The layer's `r`, `lora_alpha` and `scaling` follow, so at rank b it *is* a stock LoRA layer of rank b; see
`peft_dynamic.tuners.factors` for how.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peft_dynamic.functional.ranks import alpha_at, gram_matrices
from peft_dynamic.tuners.dylora.bases import find_bases, prepare
from peft_dynamic.tuners.dylora.config import DyLoRAConfig
from peft_dynamic.tuners.dylora.schedule import RankSchedule, enlist
from peft_dynamic.tuners.dylora.view import RankView
from peft_dynamic.tuners.factors import LayerViews, ViewedParameterDict, attach, install, is_sharded, layout, note_unit
from peft_dynamic.tuners.mixer import add_mixer

_order = count()  # of making


class AdapterRanks(LayerViews):
    """The rank state of one adapter in one layer.

    Attributes:
        max_rank: r of this layer: the config's, or what `rank_pattern` says, a cap or a multiple.
        per_rank: how many ranks the layer has for each of the adapter: above 1 for fused projections.
        rank: the layer's rank at the set rank, in use everywhere but in a training forward pass.
        asked: the rank that was asked for; above `rank` where the layer is capped.
    """

    parts: tuple[tuple[nn.Module, str, RankView], tuple[nn.Module, str, RankView]]

    def __init__(
        self,
        schedule: RankSchedule,
        truncation: str,
        rule: str,
        lora_alpha: float,
        max_rank: int,
        parts: tuple[Any, Any],
    ) -> None:
        super().__init__(parts)
        self.schedule = schedule
        self.order = next(_order)
        self.truncation = truncation
        self.rule = rule
        self.lora_alpha = lora_alpha
        self.max_rank = max_rank
        self.per_rank = max(1, max_rank // schedule.ranks[-1])
        self.rank, self.asked = max_rank, max_rank // self.per_rank
        self.outside_training: tuple[int, float, Any] | None = None  # r, lora_alpha, scaling to go back to
        self._basis: tuple[torch.Tensor, torch.Tensor] | None = None
        self.basis_key: Any = None
        enlist(self)

    def of(self, rank: int) -> int:
        """The layer's rank where the adapter has `rank`."""
        return min(rank * self.per_rank, self.max_rank)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forget()
        enlist(self)  # a deep copy or an unpickled one

    def basis(self) -> tuple[torch.Tensor, torch.Tensor]:
        """E and F of `leading_components` for the factors as they are now."""
        if self._basis is not None and torch.compiler.is_compiling():
            return self._basis  # kept up to date outside the graph: see prepare
        return self._current_basis()

    def state_key(self) -> tuple[int, ...]:
        """Changes whenever the factors do; the step counter is for optimizers that bypass torch's version counters."""
        (holder_a, name_a, view_a), (holder_b, name_b, _) = self.parts
        # Asked for at every look at a factor, where decoding one token at a time feels it: no function calls here.
        a: torch.Tensor | None = holder_a._parameters.get(name_a)
        b: torch.Tensor | None = holder_b._parameters.get(name_b)
        if a is None or b is None:
            a, b = self.factors()
        key = (self.schedule.updates, id(a), a._version, id(b), b._version)
        mixer = view_a.mixer
        return key if mixer is None else (*key, id(mixer.value), mixer.value._version)

    @torch.compiler.disable
    def _current_basis(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_out_of_date():
            if any(is_sharded(factor) for factor in self.factors()):
                raise RuntimeError(
                    "truncation='svd' needs both factors of a layer at once, and FSDP has gathered one of them only: "
                    "wrap whole transformer blocks, not single linear layers, or use truncation='prefix'."
                )
            find_bases([self])
        assert self._basis is not None
        return self._basis

    def is_out_of_date(self) -> bool:
        return self._basis is None or self.state_key() != self.basis_key or self.has_changed()

    def grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, r, r) each: M A A^T M^T and B^T B."""
        a, b = self.factors()
        (_, _, view_a), (_, _, view_b) = self.parts
        return gram_matrices(
            view_a.matrices(a), view_b.matrices(b), None if view_a.mixer is None else view_a.mixer.value
        )

    def keep_basis(self, e: torch.Tensor, f: torch.Tensor) -> None:
        dtype = torch.promote_types(self.factors()[0].dtype, torch.float32)
        self._basis = (e.to(dtype), f.to(dtype))
        self.basis_key = self.state_key()
        self._seen = None  # its versions may be the old ones
        self.remember()

    def forget_basis(self) -> None:
        """The factors may have changed without a sign."""
        self._basis = self.basis_key = self._seen = None

    def forget(self) -> None:
        super().forget()
        self.forget_basis()

    def wants_basis(self, rank: int) -> bool:
        at_hand = not any(is_sharded(factor) or factor.device.type == "meta" for factor in self.factors())
        return self.truncation == "svd" and rank < self.max_rank and at_hand

    def enter(self, layer: LoraLayer, adapter_name: str) -> None:
        """A training forward pass: the drawn rank holds."""
        super().enter(layer, adapter_name)
        schedule = self.schedule
        if schedule.suspended or not self.is_trained():
            return
        self.outside_training = (layer.r[adapter_name], layer.lora_alpha[adapter_name], layer.scaling[adapter_name])
        multiplier = layer.scaling[adapter_name] / (layer.lora_alpha[adapter_name] / layer.r[adapter_name])
        rank = self.of(schedule.drawn)
        frozen = self.of(schedule.below(schedule.drawn)) if schedule.update == "frozen" else 0
        _show(layer, adapter_name, rank, frozen)
        scale = layer.lora_alpha[adapter_name] / rank
        layer.scaling[adapter_name] = scale if multiplier == 1 else scale * multiplier

    def leave(self, layer: LoraLayer, adapter_name: str) -> None:
        super().leave(layer, adapter_name)
        if self.outside_training is not None:
            for _, _, view in self.parts:
                view.show(self.rank)
            layer.r[adapter_name], layer.lora_alpha[adapter_name], layer.scaling[adapter_name] = self.outside_training
            self.outside_training = None

    def is_trained(self) -> bool:
        return any(factor.requires_grad for factor in self.factors())

    def moving_parts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each factor with the mask of the components that this step trains under update="frozen"."""
        stop = self.of(self.schedule.drawn)
        start = self.of(self.schedule.below(self.schedule.drawn))
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
    groups_a, groups_b, divisor = layout(layer)
    indivisible = [min(rank, max_rank) for rank in schedule.ranks if min(rank, max_rank) % divisor]
    if indivisible:
        raise ValueError(
            f"DyLoRA cannot use the ranks {indivisible} on {type(layer.get_base_layer()).__name__} with "
            f"groups={divisor}: each group takes an equal part of the rank. Pass ranks divisible by {divisor}, or "
            "leave the layer out."
        )
    mixer = add_mixer(layer, adapter_name, config, groups_a[0], max_rank // divisor) if config.use_mixer else None
    view_a = RankView(0, max_rank, groups_a, divisor, mixer)
    view_b = RankView(1, max_rank, groups_b, divisor)
    parts = install(layer, adapter_name, "DyLoRA", view_a, view_b)
    ranks = AdapterRanks(schedule, config.truncation, config.scaling, layer.lora_alpha[adapter_name], max_rank, parts)
    attach(layer, adapter_name, ranks)
    _show(layer, adapter_name, max_rank)
    prepare([(ranks, ranks.of(schedule.drawn))])
    _set_scaling(layer, adapter_name, layer.lora_alpha[adapter_name] / layer.r[adapter_name])


def set_layer_rank(layer: LoraLayer, adapter_name: str, asked: int) -> None:
    """Use rank `asked`, or the layer's cap if smaller, outside training. A factor set by `scale_layer` stays."""
    ranks: AdapterRanks = layer.lora_views[adapter_name]
    if adapter_name in layer.merged_adapters:
        raise ValueError(
            f"the adapter {adapter_name!r} is merged at rank {ranks.rank}, so its rank cannot change to {asked}: "
            "unmerging would take out another update than was put in. Call unmerge_adapter() first."
        )
    factors = layer.lora_A if adapter_name in layer.lora_A else layer.lora_embedding_A
    intact = factors if isinstance(factors, ViewedParameterDict) else factors[adapter_name]
    if intact is not ranks.parts[0][0]:
        raise ValueError(
            f"the factors of the adapter {adapter_name!r} were replaced (prepare_model_for_compiled_hotswap pads "
            "them), so its rank can no longer change. Set the rank before, or export it with export_lora."
        )
    multiplier = layer.scaling[adapter_name] / (layer.lora_alpha[adapter_name] / layer.r[adapter_name])
    ranks.asked, ranks.rank = asked, ranks.of(asked)
    for _, _, view in ranks.parts:
        view.forget()  # a sure way to have changes through .data seen, which torch's version counters miss
    _show(layer, adapter_name, ranks.rank)
    scale = layer.lora_alpha[adapter_name] / ranks.rank
    _set_scaling(layer, adapter_name, scale if multiplier == 1 else scale * float(multiplier))


def _show(layer: LoraLayer, adapter_name: str, rank: int, frozen_below: int = 0) -> None:
    ranks: AdapterRanks = layer.lora_views[adapter_name]
    for _, _, view in ranks.parts:
        view.show(rank, frozen_below)
    layer.r[adapter_name] = rank
    layer.lora_alpha[adapter_name] = alpha_at(ranks.rule, ranks.lora_alpha, rank, ranks.max_rank)


def _set_scaling(layer: LoraLayer, adapter_name: str, value: float) -> None:
    if isinstance(layer.scaling[adapter_name], torch.Tensor):  # after prepare_model_for_compiled_hotswap
        layer.scaling[adapter_name].fill_(value)
    else:
        layer.scaling[adapter_name] = value
    note_unit(layer, adapter_name)


def ranked_layers(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, Any]]:
    """(name, layer) of each layer of `model` with the DyLoRA adapter, or with any."""
    for name, module in model.named_modules():
        ranked = ranked_adapters(module)
        if ranked and (adapter_name is None or adapter_name in ranked):
            yield name, module


def ranked_adapters(module: nn.Module) -> list[str]:
    """Names of the DyLoRA adapters in a layer."""
    return [name for name, views in getattr(module, "lora_views", {}).items() if isinstance(views, AdapterRanks)]
