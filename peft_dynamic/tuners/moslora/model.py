"""MoSLoRA's tuner: PEFT's `LoraModel`, whose layers get a mixer."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraLayer

from peft_dynamic.tuners.base import ComputedLoraModel
from peft_dynamic.tuners.computed import ComputedFactor, install, layout
from peft_dynamic.tuners.factors import LayerState, attach
from peft_dynamic.tuners.mixer import add_mixer


class MoSLoRAModel(ComputedLoraModel):
    """A model with MoSLoRA adapters, made by `get_peft_model(model, MoSLoRAConfig(...))`.

    The weight of each layer's `lora_A` is M A, so that the layer is a stock LoRA layer for everything else.

    Source: Wu et al., EMNLP 2024, arXiv 2406.11909.
    """

    method = "MoSLoRA"

    def _make_computed(self, layer: LoraLayer, adapter_name: str, config: Any) -> None:
        groups_a, groups_b, divisor = layout(layer)
        rank = layer.r[adapter_name]
        mixer = add_mixer(layer, adapter_name, config, groups_a[0], rank // divisor)
        factor_a = ComputedFactor(0, rank, groups_a, divisor, mixer)
        factor_b = ComputedFactor(1, rank, groups_b, divisor)
        attach(layer, adapter_name, LayerState(install(layer, adapter_name, self.method, factor_a, factor_b)))
