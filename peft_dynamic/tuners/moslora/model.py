"""MoSLoRA's tuner: PEFT's `LoraModel`, whose layers get a mixer."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peft_dynamic.hosts.total_steps import tell_total_steps
from peft_dynamic.tuners.base import ComputedLoraModel
from peft_dynamic.tuners.computed import ComputedFactor, install, layout
from peft_dynamic.tuners.factors import LayerState, attach
from peft_dynamic.tuners.mixer import SPECTRAL, add_mixer
from peft_dynamic.tuners.moslora.freeze import (
    FreezeSchedule,
    FreezingFactor,
    FreezingState,
    StillState,
    check_linear,
    start_spectral,
)
from peft_dynamic.tuners.steps import PassHooks


class MoSLoRAModel(ComputedLoraModel):
    """A model with MoSLoRA adapters, made by `get_peft_model(model, MoSLoRAConfig(...))`.

    The weight of each layer's `lora_A` is M A, so that the layer is a stock LoRA layer for everything else. Where A is
    not trained the weight of `lora_B` is B M instead: the backward pass then needs A x, and not x.

    Source: Wu et al., EMNLP 2024, arXiv 2406.11909; Azizi et al., Findings of EMNLP 2024, arXiv 2406.12832.
    """

    method = "MoSLoRA"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self.peft_config[adapter_name].freezes:
            self._register_hooks(model, adapter_name, PassHooks)
            tell_total_steps()

    def _create_and_replace(self, lora_config: Any, *args: Any, **kwargs: Any) -> None:
        if lora_config.init_lora_weights == SPECTRAL:  # which PEFT does not know
            lora_config = copy(lora_config)
            lora_config.init_lora_weights = True
        super()._create_and_replace(lora_config, *args, **kwargs)

    def _make_computed(self, layer: LoraLayer, adapter_name: str, config: Any) -> None:
        config = self.peft_config[adapter_name]
        groups_a, groups_b, divisor = layout(layer)
        rank = layer.r[adapter_name]
        if config.init_lora_weights == SPECTRAL:
            check_linear(layer, adapter_name, "init_lora_weights='spectral'")
            if not config.inference_mode:  # a checkpoint comes next
                start_spectral(layer, adapter_name)
        elif not config.train_a:
            check_linear(layer, adapter_name, "train_a=False")
        mixer = add_mixer(layer, adapter_name, config, groups_a[0], rank // divisor)
        kind = FreezingFactor if config.freezes else ComputedFactor
        factor_a = ComputedFactor(0, rank, groups_a, divisor, mixer if config.train_a else None)
        factor_b = kind(1, rank, groups_b, divisor, None if config.train_a else mixer)
        parts = install(layer, adapter_name, self.method, factor_a, factor_b)
        if config.freezes:
            schedule = self._schedule(adapter_name)
            attach(layer, adapter_name, FreezingState(schedule, parts))
            self._keep_in_state_dict(schedule, layer, adapter_name)
        else:
            attach(layer, adapter_name, (LayerState if config.train_a else StillState)(parts))
        still = (*(() if config.train_a else ("lora_A",)), *(("lora_B",) if config.freeze_b == 0 else ()))
        if still:
            # PEFT's own, of each layer: it goes by them wherever it makes the adapter trained again
            layer.frozen_peft_weight_names = layer.frozen_peft_weight_names | {adapter_name: still}
            layer._freeze_non_trainable_peft_weights(adapter_name)

    def _new_schedule(self, config: Any) -> nn.Module:
        return FreezeSchedule(config.freeze_b, config.total_steps)

    def _weighted(self, config: Any, adapter_name: str) -> Any:
        plain = {"train_a": True, "freeze_b": None, "total_steps": None}
        if config.init_lora_weights == SPECTRAL:
            plain["init_lora_weights"] = True
        return replace(config, mixer_init="identity", train_mixer=False, **plain)
