"""Layers of LoRETTA_adp: a linear layer that is a tensor train, and the adapter around a linear layer of the model."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.activations import ACT2FN

from peft_dynamic.hosts.blocks import linear_features
from peft_dynamic.tuners.factors import enable_also
from peft_dynamic.tuners.loretta_adp.config import LorettaAdpConfig
from peft_dynamic.tuners.tensor_train import TensorTrainLinear


class LorettaAdpLayer(nn.Module, BaseTunerLayer):
    """A linear layer of the model with adapters on its output, or on its input.

    With several active adapters each sees the same h and their terms are added: y = h + sum_i adapter_i(h).

    Args:
        base_layer: the layer.
        adapter_name: name of the first adapter.
        config: its configuration.
        before: whether it works on the layer's input.
    """

    adapter_layer_names = ("loretta_down", "loretta_up", "loretta_dropout", "loretta_activation")
    other_param_names = ("loretta_scaling", "loretta_before")
    # of BaseTunerLayer, which carries no annotations
    _disable_adapters: bool
    active_adapters: Any
    set_adapter: Any
    _cast_input_dtype: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LorettaAdpConfig, before: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        features = linear_features(base_layer)
        assert features is not None, "the model checks its targets first"
        self.in_features, self.out_features = features
        self.loretta_down, self.loretta_up = nn.ModuleDict(), nn.ModuleDict()
        self.loretta_dropout, self.loretta_activation = nn.ModuleDict(), nn.ModuleDict()
        self.loretta_scaling: dict[str, float] = {}
        self.loretta_before: dict[str, bool] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, before)

    def update_layer(self, adapter_name: str, config: LorettaAdpConfig, before: bool) -> None:
        """Add an adapter."""
        hidden = self.in_features if before else self.out_features
        rank, shape = config.tensor_rank, config.tensor_shape
        down = TensorTrainLinear(hidden, config.bottleneck, rank, shape)
        up = TensorTrainLinear(config.bottleneck, hidden, rank, shape, zero=config.init_weights is True)
        self.loretta_down[adapter_name], self.loretta_up[adapter_name] = down, up
        if config.dropout:
            self.loretta_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.loretta_activation[adapter_name] = ACT2FN[config.non_linearity]
        self.loretta_scaling[adapter_name] = float(config.scaling)
        self.loretta_before[adapter_name] = before
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Apply the layer and its active adapters.

        Args:
            x: (..., in).
            args: further arguments of the base layer.
            kwargs: likewise.

        Returns:
            (..., out), of the base layer's dtype.
        """
        base_layer: Any = self.base_layer
        if self._disable_adapters:
            return base_layer(x, *args, **kwargs)
        before = self.loretta_before
        active = [name for name in self.active_adapters if name in before]
        for_input = [name for name in active if before[name]]
        if for_input:
            x = self._adapted(x, for_input)
            active = [name for name in active if not before[name]]
        result = base_layer(x, *args, **kwargs)
        return self._adapted(result, active) if active else result

    def _adapted(self, hidden: torch.Tensor, names: list[str]) -> torch.Tensor:
        """Adapters' terms added to `hidden` (..., hidden), in the adapters' dtype and rounded once."""
        result = hidden
        for name in names:
            down: Any = self.loretta_down[name]
            up: Any = self.loretta_up[name]
            activation: Any = self.loretta_activation[name]
            x = self._cast_input_dtype(hidden, down.dtype)
            if name in self.loretta_dropout:
                dropout: Any = self.loretta_dropout[name]
                x = dropout(x)
            term = up(activation(down(x)))
            scaling = self.loretta_scaling[name]
            result = result + (term if scaling == 1 else term * scaling)
        return result.to(hidden.dtype)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        enable_also(self, enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def __repr__(self) -> str:
        return "loretta_adp." + super().__repr__()


CANNOT_MERGE = (
    "LoRETTA_adp cannot be merged: its adapters have a non-linearity, so no weight of a base layer does what they do. "
    "Keep the adapter beside the base model, or call unload() to get the base model back. For an adapter that merges, "
    "train LoRETTA_rep (LorettaRepConfig)."
)
