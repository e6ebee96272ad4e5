"""The layers of DyLoRA: PEFT's own LoRA layers, whose factors are cut to the rank in use.

The layer's `r`, `lora_alpha` and `scaling` follow, so at rank b it *is* a stock LoRA layer of rank b; see
`peft_dynamic.tuners.factors` for how.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peft_dynamic.tuners.computed import ComputedParameterDict, install, layout
from peft_dynamic.tuners.dylora.config import DyLoRAConfig
from peft_dynamic.tuners.dylora.ranks import AdapterRanks, RankedFactor, prepare
from peft_dynamic.tuners.dylora.schedule import RankSchedule
from peft_dynamic.tuners.factors import attach, note_unit
from peft_dynamic.tuners.mixer import add_mixer


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
    factor_a = RankedFactor(0, max_rank, groups_a, divisor, mixer)
    factor_b = RankedFactor(1, max_rank, groups_b, divisor)
    parts = install(layer, adapter_name, "DyLoRA", factor_a, factor_b)
    ranks = AdapterRanks(schedule, config.truncation, config.scaling, layer.lora_alpha[adapter_name], max_rank, parts)
    attach(layer, adapter_name, ranks)
    ranks.use(layer, adapter_name, max_rank)
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
    intact = factors if isinstance(factors, ComputedParameterDict) else factors[adapter_name]
    if intact is not ranks.parts[0][0]:
        raise ValueError(
            f"the factors of the adapter {adapter_name!r} were replaced (prepare_model_for_compiled_hotswap pads "
            "them), so its rank can no longer change. Set the rank before, or export it with export_lora."
        )
    multiplier = layer.scaling[adapter_name] / (layer.lora_alpha[adapter_name] / layer.r[adapter_name])
    ranks.asked, ranks.rank = asked, ranks.of(asked)
    ranks.forget()  # a sure way to have changes through .data seen, which torch's version counters miss
    ranks.use(layer, adapter_name, ranks.rank)
    scale = layer.lora_alpha[adapter_name] / layer.r[adapter_name]
    _set_scaling(layer, adapter_name, scale if multiplier == 1 else scale * float(multiplier))


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
