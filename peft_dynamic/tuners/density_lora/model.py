"""The tuner: PEFT's `LoraModel`, which attaches a density loss for each adapter.

Notable: the weights of the factors are what is stored. The states in the layers change nothing, and are there so that
`export_lora`, `push_adapter` and the checks of a checkpoint work as for our other adapters.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from peft import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peft_dynamic.density.loss import ActivationDensityLoss
from peft_dynamic.tuners.base import ComputedLoraModel
from peft_dynamic.tuners.computed import ComputedFactor, install, layout
from peft_dynamic.tuners.factors import LayerState, attach


class DensityLoRAModel(ComputedLoraModel):
    """A model with LoRA adapters and a density loss, made by `get_peft_model(model, DensityLoRAConfig(...))`.

    Attributes:
        density: adapter name -> its `ActivationDensityLoss`. It acts while the adapter is active and enabled. A loop
            that makes its own loss adds `model.base_model.density["default"].penalty()`.

    Source: Runwal et al., AAAI 2025, arXiv 2402.01911.
    """

    method = "DensityLoRA"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, with the density loss; where the model has no activations to count it is left as it was."""
        config = self.peft_config[adapter_name]
        losses = self.__dict__.setdefault("density", {})
        loss = ActivationDensityLoss(
            weight=config.density_weight,
            eps=config.density_eps,
            surrogate=config.surrogate,
            activation_modules=config.activation_modules,
            layer_weights=config.density_layer_weights,
            include_padding=config.include_padding,
        )
        loss.weights_name = "density_layer_weights"
        self._forget(adapter_name)
        self.__dict__["_loss"] = loss
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            loss.detach()
            raise
        finally:
            del self.__dict__["_loss"]
        loss.when = partial(_is_active, model, adapter_name)
        losses[adapter_name] = loss

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)  # which may replicate layers
        self.__dict__["_loss"].attach(model)  # before anything else is changed: it may refuse the model

    def _make_computed(self, layer: LoraLayer, adapter_name: str, config: Any) -> None:
        groups_a, groups_b, divisor = layout(layer)
        rank = layer.r[adapter_name]
        factor_a, factor_b = ComputedFactor(0, rank, groups_a, divisor), ComputedFactor(1, rank, groups_b, divisor)
        attach(layer, adapter_name, LayerState(install(layer, adapter_name, self.method, factor_a, factor_b)))

    def _forget(self, adapter_name: str) -> None:
        if adapter_name in self.density:
            self.density.pop(adapter_name).detach()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's own: the factors are what they show."""
        LoraModel.add_weighted_adapter(self, *args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        for loss in self.density.values():
            loss.detach()
        return model


def _is_active(model: nn.Module, adapter_name: str) -> bool:
    layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    return layer is not None and adapter_name in layer.active_adapters and not layer.disable_adapters
