"""Layers of LoRETTA_adp: a linear layer that is a tensor train, and the adapter around a linear layer of the model."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from peft_dynamic.functional.tensor_train import (
    apply_split,
    check_shape,
    contract,
    core_shapes,
    factorize,
    init_cores,
    prefers_dense,
    split,
)
from peft_dynamic.tuners.factors import enable_also
from peft_dynamic.tuners.quantization import is_quantized

from .config import LorettaAdpConfig


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer that takes a tensor, plain or quantised; None for any other module."""
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return int(rows), int(columns)
    if isinstance(module, nn.Linear):
        # torch's attention reads the weight of its out_proj and never calls it, so an adapter there would do nothing
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return None
        return module.in_features, module.out_features
    if is_quantized(module):
        for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
            if all(isinstance(getattr(module, name, None), int) for name in names):
                return getattr(module, names[0]), getattr(module, names[1])
    return None


class TensorTrainLinear(nn.Module):
    """A linear layer x W + bias whose (in, out) matrix W is a tensor train.

    In training the train is contracted in each forward pass, and gradients reach the cores. Without gradients the
    contraction is kept until a core changes.

    Args:
        in_features: rows of W.
        out_features: columns of W.
        tensor_rank: rank between neighbouring cores.
        shape: k_1, ..., k_d; None for an automatic shape.
        zero: the layer starts as exactly 0 (last core and bias 0). The other cores are random, so the last core gets a
            gradient at once.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tensor_rank: int,
        shape: list[int] | None = None,
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.tensor_rank = in_features, out_features, tensor_rank
        self.shape = tuple(shape) if shape is not None else factorize(in_features, out_features)
        check_shape(self.shape, in_features, out_features, tensor_rank)
        cores = init_cores(self.shape, tensor_rank, in_features, out_features)
        if zero:
            cores[-1] = torch.zeros_like(cores[-1])
        # One parameter for all cores: with one for each, an optimizer's step takes more than twice the time.
        # Adapters are saved in this form, so what `factorize` gives for a size must never change.
        self.cores = nn.Parameter(torch.cat([core.flatten() for core in cores]))
        bias = (
            torch.zeros(out_features) if zero else torch.empty(out_features).uniform_(-1, 1) / math.sqrt(out_features)
        )
        self.bias = nn.Parameter(bias)
        self._core_shapes = core_shapes(self.shape, tensor_rank)
        self._core_sizes = [math.prod(core) for core in self._core_shapes]
        # Building the matrix pays off, if at all, only with many tokens, so the choice need not follow their number.
        self._dense = prefers_dense(512, self.shape, tensor_rank, in_features, out_features)
        self._cache: tuple[Any, tuple[torch.Tensor, ...], torch.Tensor] | None = (
            None  # key, what is kept, of which cores
        )

    def core_list(self) -> list[torch.Tensor]:
        """G_1, ..., G_d, views of the parameter `cores`."""
        parts = self.cores.split(self._core_sizes)
        return [part.view(shape) for part, shape in zip(parts, self._core_shapes, strict=True)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        return self.bias.dtype

    def contraction(self) -> tuple[torch.Tensor, ...]:
        """W (in, out), or the two thin matrices of `split` where those are cheaper; from the cache where it holds."""
        cores = self.cores
        if cores.requires_grad and torch.is_grad_enabled():
            # An optimizer that writes to `parameter.data` leaves no trace there, so a training pass ends a cache too.
            self._cache = None
            return self._contract()
        if torch.compiler.is_compiling() or cores.is_inference():
            return self._contract()
        # `module.to` keeps the parameter and its version and swaps the data; so the place and kind of the data count.
        # Writes through `.data` leave no trace at all; so the values themselves are compared.
        key = (id(cores), cores._version, cores.data_ptr(), cores.dtype, cores.device)
        cache = self._cache
        if cache is None or cache[0] != key or not torch.equal(cache[2], cores):
            # Ordinary tensors even from an evaluation under inference_mode: a pass with gradients may use them next.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = cache = key, self._contract(), cores.detach().clone()
        return cache[1]

    def _contract(self) -> tuple[torch.Tensor, ...]:
        device = self.cores.device.type
        if torch.is_autocast_enabled(device):  # rounding after each core would add up, and costs nothing to avoid
            with torch.autocast(device, enabled=False):
                return self._contract()
        if self._dense:
            return (contract(self.core_list(), self.in_features, self.out_features),)
        return split(self.core_list(), self.in_features)

    def matrix(self) -> torch.Tensor:
        """W, (in, out)."""
        return contract(self.core_list(), self.in_features, self.out_features)

    def as_linear(self) -> nn.Linear:
        """An ordinary linear layer that computes the same, up to rounding."""
        linear = nn.Linear(self.in_features, self.out_features, device=self.bias.device, dtype=self.dtype)
        with torch.no_grad():
            linear.weight.copy_(self.matrix().mT)
            linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: (..., in), of any floating dtype.

        Returns:
            (..., out), of x's dtype; or of autocast's under autocast.
        """
        parts = self.contraction()
        if self._dense:
            result = nn.functional.linear(x.to(self.dtype), parts[0].mT, self.bias)
        else:
            result = apply_split(x.to(self.dtype), parts[0], parts[1], self.bias)
        return result if torch.is_autocast_enabled(x.device.type) else result.to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}  # copies and pickles make their own

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, shape={self.shape}, tensor_rank={self.tensor_rank}"


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
