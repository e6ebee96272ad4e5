"""LoRETTA_rep's tuner: PEFT's `LoraModel`, whose factors become tensor trains."""

from __future__ import annotations

import math
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peft_dynamic.tuners.also_trained import AlsoTrained, Extras
from peft_dynamic.tuners.as_lora import refuse_experts
from peft_dynamic.tuners.base import ComputedLoraModel
from peft_dynamic.tuners.factors import LayerState, attach, keep_together, note_unit
from peft_dynamic.tuners.loretta_rep.config import LorettaRepConfig
from peft_dynamic.tuners.loretta_rep.factor import make_tt_factor


class LorettaRepModel(AlsoTrained, ComputedLoraModel):
    """A model with LoRETTA_rep adapters, made by `get_peft_model(model, LorettaRepConfig(...))`.

    Each layer's `lora_A` and `lora_B` show the matrices of their tensor trains, so that the layer is a stock LoRA layer
    for everything else.

    Source: Yang et al., NAACL 2024, arXiv 2402.11417.
    """

    method = "LoRETTA_rep"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._target_experts(model, self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._train_extras(model, adapter_name, self.__dict__.pop("_extras"))
        keep_together(model, LoraLayer)

    def _prepare_model(self, peft_config: LorettaRepConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)  # which may replicate layers
        self.__dict__["_extras"] = Extras(model, peft_config)

    def _target_experts(self, model: nn.Module, config: Any) -> None:
        refuse_experts(config, model, "LorettaRepConfig")

    def _make_computed(self, layer: LoraLayer, adapter_name: str, config: LorettaRepConfig) -> None:
        base_layer = layer.get_base_layer()
        modules = [factors[adapter_name] for factors in (layer.lora_A, layer.lora_B) if adapter_name in factors]
        if [type(module) for module in modules] != [nn.Linear, nn.Linear]:
            raise ValueError(
                f"LorettaRepConfig: target_modules must be linear layers, and one is a {type(base_layer).__name__}. "
                "Leave it out; LoRA, DyLoRA and MoSLoRA adapt it."
            )
        rank = layer.r[adapter_name]
        where = f"{type(base_layer).__name__}({layer.in_features}, {layer.out_features})"
        views = [make_tt_factor(module, dim, config, rank, where) for dim, module in enumerate(modules)]
        attach(layer, adapter_name, LayerState(((modules[0], "cores", views[0]), (modules[1], "cores", views[1]))))
        if config.init_weights == "noise_removal":  # a LoRA of twice the rank and the same scale
            layer.r[adapter_name] = 2 * rank
            divisor = math.sqrt(2 * rank) if config.use_rslora else 2 * rank
            layer.lora_alpha[adapter_name] = layer.scaling[adapter_name] * divisor
            note_unit(layer, adapter_name)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "LoRETTA_rep adapters cannot be combined: the sum of two tensor trains is none of the same rank. Write "
            "each with export_lora, load them with PEFT, and combine those LoRA adapters."
        )
