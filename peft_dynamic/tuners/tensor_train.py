"""A linear layer that is a tensor train."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

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

    made_from = ("cores",)  # the names under which a checkpoint has the matrix

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
