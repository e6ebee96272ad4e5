"""A LoRA factor that is a tensor train: it stores the cores and shows their matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from peft_dynamic.functional.tensor_train import check_shape, contract, core_shapes, factorize, init_cores
from peft_dynamic.hosts.offload import real
from peft_dynamic.tuners.computed import ComputedFactor, KeptWeight


class TensorTrainWeight(ComputedFactor):
    """The weight of a factor, from its cores.

    Args:
        dim: 0 for A, 1 for B.
        rank: the bottleneck.
        features: (in, out) of the factor's map.
        shapes: of the cores.
    """

    made_from = ("cores", "start")

    def __init__(self, dim: int, rank: int, features: tuple[int, int], shapes: list[tuple[int, int, int]]) -> None:
        super().__init__(dim, rank)
        self.features = features
        self.shapes = shapes
        self.sizes = [math.prod(shape) for shape in shapes]
        self.start: torch.Tensor | None = None

    def is_plain(self) -> bool:
        return False

    def sources(self, full: torch.Tensor) -> list[torch.Tensor]:
        return [full] if self.start is None else [full, self.start]

    def compute(self, full: torch.Tensor) -> torch.Tensor:
        weight = self._matrix(full)
        if self.start is None:
            return weight
        # B A x - B0 A0 x is a LoRA with the factors [A; A0] and [B, -B0]
        start = self._matrix(self.start)
        return torch.cat([weight, -start if self.dim else start], self.dim).to(full.dtype)

    def _matrix(self, cores: torch.Tensor) -> torch.Tensor:
        # in single precision at least: rounding after each core would add up
        wide = cores.to(torch.promote_types(cores.dtype, torch.float32))
        parts = zip(wide.split(self.sizes), self.shapes, strict=True)
        return contract([part.view(shape) for part, shape in parts], *self.features).mT.to(cores.dtype)


class TensorTrainFactor(KeptWeight, nn.Linear):
    """`nn.Linear` whose weight is the matrix of a tensor train.

    It stores all cores in one vector, the parameter `cores`: a parameter for each would cost the optimizer more than
    the rest of the step. With noise removal the vector of the start is kept as the buffer `start`.
    """

    view: TensorTrainWeight
    cores: torch.Tensor
    start: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        if "start" in self._buffers:
            self.view.start = real(self, "start", self.start)
        return self.view.owner.look_up(self.view, real(self, "cores", self.cores))

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        raise AttributeError("the weight of a tensor train is made from its cores; load or change those")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.view.forget()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self.view.forget()
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tensor_shape={[shape[1] for shape in self.view.shapes]}"


def make_tt_factor(linear: nn.Linear, dim: int, config: Any, rank: int, where: str) -> TensorTrainWeight:
    """Turn a LoRA factor into a tensor train; returns its view.

    Args:
        linear: lora_A (in -> rank) or lora_B (rank -> out).
        dim: 0 for A, 1 for B.
        config: the `LorettaRepConfig`.
        rank: the bottleneck of this layer.
        where: the layer, for messages.

    Raises:
        ValueError: the shape or rank does not fit this layer.
    """
    features = (linear.in_features, linear.out_features)
    shape = config.tensor_shape or factorize(*features)
    try:
        check_shape(shape, *features, config.tensor_rank)
    except ValueError as error:
        raise ValueError(f"LorettaRepConfig, at {'lora_B' if dim else 'lora_A'} of {where}: {error}") from error
    old = linear._parameters.pop("weight")
    assert old is not None
    cores = init_cores(shape, config.tensor_rank, *features, dtype=torch.float32, device=old.device)
    view = TensorTrainWeight(dim, rank, features, core_shapes(shape, config.tensor_rank))
    train: Any = linear
    train.__class__ = TensorTrainFactor
    train.view = view
    vector = torch.cat([core.flatten() for core in cores]).to(old.dtype)
    if config.init_weights == "noise_removal":
        train.register_buffer("start", vector.clone())
    elif dim == 1 and config.init_weights is True:
        vector[-cores[-1].numel() :] = 0
    train.register_parameter("cores", nn.Parameter(vector, requires_grad=old.requires_grad))
    return view


# The names of before.
TrainView, TrainFactor, make_train = TensorTrainWeight, TensorTrainFactor, make_tt_factor
