"""LoRA factors whose weight is computed from what they store.

Notable: there are no copies of PEFT's layer classes here. `lora_A` and `lora_B` become subclasses of what they are,
whose `weight` is what the method makes of the stored tensors: a part of them (DyLoRA), a product with a mixer
(MoSLoRA), the matrix of a tensor train (LoRETTA). For everything in PEFT that reads a factor the layer thus *is* a
stock LoRA layer: forward, merge, unmerge, `get_delta_weight`, mixed batches, on every backend whose LoRA layer calls
`lora_A` and `lora_B`. The stored tensors stay where the optimizer, `state_dict` and FSDP look for them, in
`_parameters`. What is computed when, and how long it holds, is the business of the layer's state in `factors.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from peft_dynamic.hosts.offload import is_put_away_by_host, real
from peft_dynamic.tuners.mixer import Mixer


class Owner(Protocol):
    """The state of the layer that a factor belongs to, as far as the factor knows it."""

    def look_up(self, factor: ComputedFactor, full: torch.Tensor) -> torch.Tensor:
        """The factor's weight, from its stored tensor or from what was computed before."""
        ...

    def forget(self) -> None:
        """The stored tensors have changed."""
        ...


class ComputedFactor:
    """How the weight of one factor is made of its stored tensor.

    Args:
        dim: where the rank lies in the factor: 0 for A, 1 for B.
        max_rank: r of the layer.
        groups: (outer, inner): how many ranks' worth of entries lie around the rank inside `dim`, as in `slice_rank`.
        divisor: a grouped convolution has `1 / divisor` of the rank in each group.
        mixer: what the factor is multiplied with (MoSLoRA): A from the left, or B of a linear layer from the right.

    Attributes:
        owner: the state of the layer, which keeps what was computed.
        is_read: PEFT computes with the factor of an offloaded layer, so that `weight` is the computed one there too.
        rows: what is made of the factor's output where each row of a batch has a rank of its own; None elsewhere.
    """

    rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    made_from: tuple[str, ...] = ()  # the names under which a checkpoint has it, where not under the weight's
    keeps = True  # whether what is computed is worth keeping

    def __init__(
        self,
        dim: int,
        max_rank: int,
        groups: tuple[int, int] = (1, 1),
        divisor: int = 1,
        mixer: Mixer | None = None,
    ) -> None:
        self.dim = dim
        self.max_rank = max_rank // divisor
        self.groups = groups
        self.divisor = divisor
        self.mixer = mixer
        self.owner: Any = None
        self.is_read = False
        self.last_read: torch.Tensor | None = None  # the parameter, for a host that takes it out before it is refused

    @property
    def is_stock(self) -> bool:
        """Whether the weight is always the stored tensor, as in LoRA."""
        return type(self) is ComputedFactor and self.mixer is None

    def is_plain(self) -> bool:
        """Whether the weight is the stored tensor now."""
        return self.mixer is None

    def compute(self, full: torch.Tensor) -> torch.Tensor:
        """The weight, from the stored tensor; runs outside autocast."""
        return self.mixed(full)

    def state_key(self, full: torch.Tensor) -> tuple[Any, ...]:
        """Changes whenever `compute` would give something else."""
        if self.mixer is None:
            return (id(full), full._version)
        m = self.mixer.value
        return (id(full), full._version, id(m), m._version)

    def sources(self, full: torch.Tensor) -> list[torch.Tensor]:
        """All tensors that `compute` reads."""
        return [full] if self.mixer is None else [full, self.mixer.value]

    def anew(self, full: torch.Tensor) -> torch.Tensor:
        """The weight for any tensor of the factor's shape, whatever was computed before."""
        if self.is_plain():
            return full
        device = full.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return self.compute(full)
        with torch.autocast(device, enabled=False):
            return self.compute(full)

    def mixed(self, full: torch.Tensor) -> torch.Tensor:
        """M A, in A's layout, or B M."""
        if self.mixer is None:
            return full
        m = self.mixer.value.to(full)
        if self.dim == 1:
            return full @ m[0]
        if len(m) == 1:
            return (m[0] @ full.flatten(1)).view(full.shape)
        return (m @ self.matrices(full)).reshape(full.shape)

    def matrices(self, full: torch.Tensor) -> torch.Tensor:
        """The factor as matrices: (n, r, in) for A, (n, out, r) for B, n the number of experts or groups."""
        if self.dim == 0:
            return full.reshape(self.groups[0], self.max_rank, -1)
        if self.groups[1] > 1:
            return full.reshape(full.shape[0], self.max_rank, self.groups[1]).permute(2, 0, 1)
        return full.reshape(self.divisor, -1, self.max_rank)

    def forget(self) -> None:
        """The stored tensor has changed."""
        if self.owner is not None:
            self.owner.forget()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"is_read": False, "last_read": None, "rows": None}


def refused() -> RuntimeError:
    """The error for a host that would put something of its own in the place of a factor's weight."""
    return RuntimeError(
        "torch.nn.utils.prune, weight_norm, spectral_norm, a parametrization, or FSDP1 without use_orig_params=True, "
        "would replace the weight of an adapter's factor by what it makes of the weight, and this method computes the "
        "weight from what is stored. Export the adapter with export_lora, and change the export. To shard, use FSDP2."
    )


class KeptWeight(nn.Module):
    """A factor whose weight no host may replace."""

    view: ComputedFactor

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.startswith("weight_"):  # weight_orig, weight_g, ...
            taken_out = self.view.last_read
            if isinstance(taken_out, nn.Parameter) and "weight" not in self._parameters:
                self._parameters["weight"] = taken_out
            raise refused()
        super().register_parameter(name, param)


class ComputedModule(KeptWeight):
    """A LoRA factor whose `weight` is computed from the parameter of that name.

    Two kinds of hosts put a parameter away and back, and ask for it by name: accelerate's offloading and FSDP1. While
    one of them has the factor, `weight` is what is stored, and the forward pass computes.
    """

    @property
    def weight(self) -> torch.Tensor:
        full = self._parameters.get("weight")
        if full is None and (full := self.__dict__.get("weight")) is None:
            raise AttributeError("weight")
        view = self.view
        if not torch.compiler.is_compiling():
            view.last_read = full
            if not view.is_read and is_put_away_by_host(self, full):
                return full
        return view.owner.look_up(view, real(self, "weight", full))

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:  # FSDP1's plain tensor, in the place of the parameter
        if not getattr(self.view.last_read, "_fsdp_flattened", False):
            raise refused()
        self.__dict__["weight"] = value

    def __delattr__(self, name: str) -> None:
        if name != "weight":
            super().__delattr__(name)
        elif "weight" in self.__dict__:
            del self.__dict__["weight"]
        elif getattr(self._parameters.get("weight"), "_fsdp_flattened", False):
            del self._parameters["weight"]
        else:
            raise refused()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        view = self.view
        if torch.compiler.is_compiling():
            output = super().forward(*args, **kwargs)
            return output if view.rows is None else view.rows(output)
        before, view.is_read = view.is_read, True
        try:
            output = super().forward(*args, **kwargs)
        finally:
            view.is_read = before
        return output if view.rows is None else view.rows(output)

    # Two ways to change the parameter that no version counter shows for sure.
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.view.forget()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # .to(), .half(), .cuda()
        super()._apply(*args, **kwargs)
        self.view.forget()
        return self


def stored_factor(holder: nn.Module, name: str) -> torch.Tensor:
    """The stored factor: the parameter, or the tensor that FSDP1 put in its place."""
    parameter = holder._parameters.get(name)
    return holder.__dict__[name] if parameter is None else real(holder, name, parameter)


class ComputedLinear(ComputedModule, nn.Linear):
    """`nn.Linear` whose weight is computed."""


class ComputedConv1d(ComputedModule, nn.Conv1d):
    """`nn.Conv1d` whose weight is computed."""


class ComputedConv2d(ComputedModule, nn.Conv2d):
    """`nn.Conv2d` whose weight is computed."""


class ComputedConv3d(ComputedModule, nn.Conv3d):
    """`nn.Conv3d` whose weight is computed."""


COMPUTED_CLASSES: dict[type[nn.Module], type[ComputedModule]] = {
    nn.Linear: ComputedLinear,
    nn.Conv1d: ComputedConv1d,
    nn.Conv2d: ComputedConv2d,
    nn.Conv3d: ComputedConv3d,
}


class ComputedParameterDict(nn.ParameterDict):
    """Embedding factors: `factors[name]` is the computed one; `items()` and `values()` are the whole parameters."""

    views: dict[str, ComputedFactor]

    def whole(self, key: str) -> nn.Parameter:
        return super().__getitem__(key)

    def __getitem__(self, key: str) -> Any:
        view = self.views.get(key)
        return self.whole(key) if view is None else view.owner.look_up(view, self.whole(key))

    def __setitem__(self, key: str, parameter: Any) -> None:
        if key in self.views and parameter.shape != self.whole(key).shape:
            raise ValueError(
                f"the adapter {key!r} holds a factor of shape {tuple(self.whole(key).shape)}, got one of shape "
                f"{tuple(parameter.shape)}: set the full rank with set_rank before replacing it."
            )
        super().__setitem__(key, parameter)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.views.pop(key, None)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for view in self.views.values():
            view.forget()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        for view in self.views.values():
            view.forget()
        return self

    # PEFT sets requires_grad through these two, which only a whole parameter allows.
    def items(self) -> Any:
        return ((key, self.whole(key)) for key in self.keys())

    def values(self) -> Any:
        return (self.whole(key) for key in self.keys())


def layout(layer: LoraLayer) -> tuple[tuple[int, int], tuple[int, int], int]:
    """`groups` of A, `groups` of B, and their `divisor`: PEFT stores experts and groups in ways of its own."""
    if isinstance(layer, ParamWrapper):
        return (layer.num_experts, 1), (1, layer.num_experts), 1
    groups = getattr(layer.get_base_layer(), "groups", 1)
    return (groups, 1), (1, 1), groups


# Where a factor lies: the module that holds its parameter, the parameter's name there, and how its weight is made.
Part = tuple[nn.Module, str, Any]


def install(
    layer: LoraLayer, adapter_name: str, method: str, factor_a: ComputedFactor, factor_b: ComputedFactor
) -> tuple[Part, Part]:
    """Let the adapter's two factors in a LoRA layer be computed, unless they are always what is stored.

    Returns:
        The `parts` of its `LayerState`.

    Raises:
        ValueError: the layer's backend keeps its factors in modules whose weight cannot be computed.
    """
    stock = factor_a.is_stock and factor_b.is_stock
    if adapter_name in layer.lora_A:
        modules = (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
        base_layer = layer.get_base_layer()
        for module, factor in zip(modules, (factor_a, factor_b), strict=True):
            computed = COMPUTED_CLASSES.get(type(module))
            if computed is None or getattr(base_layer, "_hf_tp_plan", None) is not None:
                raise ValueError(
                    f"{method} does not support {type(layer).__name__} over {type(base_layer).__name__}: its LoRA "
                    f"factors are {type(module).__name__} modules, possibly sharded, of which nothing else can be "
                    "shown. Leave the layer out of target_modules."
                )
            if not stock:
                module.view = factor
                module.__class__ = computed
        return (modules[0], "weight", factor_a), (modules[1], "weight", factor_b)
    dicts = (layer.lora_embedding_A, layer.lora_embedding_B)
    for factors, factor in zip(dicts, (factor_a, factor_b), strict=True):
        if not isinstance(factors, ComputedParameterDict):
            factors.views = {}
            factors.__class__ = ComputedParameterDict
        if not stock:
            factors.views[adapter_name] = factor
    return (dicts[0], adapter_name, factor_a), (dicts[1], adapter_name, factor_b)
