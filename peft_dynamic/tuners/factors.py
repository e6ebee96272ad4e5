"""LoRA factors that show something computed from what they store, and the layers around them.

Notable: there are no copies of PEFT's layer classes here. `lora_A` and `lora_B` become subclasses of what they are,
whose `weight` is what the method makes of the stored tensors: a part of them (DyLoRA), a product with a mixer
(MoSLoRA), the matrix of a tensor train (LoRETTA). For everything in PEFT that reads a factor the layer thus *is* a
stock LoRA layer: forward, merge, unmerge, `get_delta_weight`, mixed batches, on every backend whose LoRA layer calls
`lora_A` and `lora_B`. The stored tensors stay where the optimizer, `state_dict` and FSDP look for them, in
`_parameters`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peft_dynamic.hosts.offload import real
from peft_dynamic.tuners.mixer import Mixer


def is_sharded(factor: torch.Tensor) -> bool:
    """Whether FSDP2, or DeepSpeed's ZeRO-3, holds the factor in parts at the moment."""
    return hasattr(factor, "placements") or is_parted(factor)


def is_parted(factor: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 does."""
    return not factor.numel() and hasattr(factor, "ds_id")


class FactorView:
    """What one factor shows as its weight.

    Args:
        dim: where the rank lies in the factor: 0 for A, 1 for B.
        max_rank: r of the layer.
        groups: (outer, inner): how many ranks' worth of entries lie around the rank inside `dim`, as in `slice_rank`.
        divisor: a grouped convolution has `1 / divisor` of the rank in each group.
        mixer: what the factor is multiplied with (MoSLoRA), for A only.
    """

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
        self.owner: LayerViews | None = None
        self.kept: tuple[Any, torch.Tensor] | None = None  # (state, what was shown) of the last inference
        self.in_forward = False  # inside a training forward pass of the layer
        self.pending: torch.Tensor | None = None  # computed in this forward pass

    made_from: tuple[str, ...] = ()  # the names under which a checkpoint has it, where not under the weight's

    def is_plain(self) -> bool:
        """Whether the stored tensor is what is shown."""
        return self.mixer is None

    def compute(self, full: torch.Tensor) -> torch.Tensor:
        """What is shown, from the stored tensor; runs outside autocast."""
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

    def of(self, full: torch.Tensor) -> torch.Tensor:
        """What is shown for the stored tensor `full`: computed once per training forward pass, kept in inference."""
        if self.is_plain():
            return full
        if torch.compiler.is_compiling():
            return self.anew(full)
        if is_parted(full):
            raise RuntimeError(
                "DeepSpeed ZeRO-3 has parted the factors of an adapter, and gathers each for its own module's forward "
                "pass only; this method computes from several. Use DDP, FSDP2 or, with a method that draws no ranks, "
                "ZeRO-2."
            )
        if torch.is_grad_enabled():
            if not self.in_forward:
                return self.anew(full)
            if self.pending is None:  # PEFT asks for the weight's dtype, then for the weight
                self.pending = self.anew(full)
            return self.pending
        assert self.owner is not None
        self.owner.verify()
        key = self.state_key(full)
        kept = self.kept
        if kept is None or kept[0] != key:
            self.kept = kept = (key, self.anew(full))
            self.owner.remember()
        return kept[1]

    def anew(self, full: torch.Tensor) -> torch.Tensor:
        """`of`, for any tensor of the factor's shape."""
        if self.is_plain():
            return full
        device = full.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return self.compute(full)
        with torch.autocast(device, enabled=False):
            return self.compute(full)

    def mixed(self, full: torch.Tensor) -> torch.Tensor:
        """M A, in A's layout."""
        if self.mixer is None:
            return full
        m = self.mixer.value.to(full)
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
        self.kept = self.pending = None
        if self.owner is not None:
            self.owner.forget()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kept": None, "pending": None, "in_forward": False}


# Hosts that ask for a parameter by name to put it away, or back: FSDP1, and accelerate's offloading.
STORE = ("torch.distributed.fsdp.", "accelerate.")
# Those that put something of their own in the place of a parameter which they read first.
REPLACE = tuple(f"torch.nn.utils.{name}" for name in ("prune", "weight_norm", "spectral_norm", "parametriz"))


def asking_host(view: FactorView, depth: int = 2) -> str:
    """The module whose code asks for a factor, called by the property that it asks; `depth` is that of its frame.

    Raises:
        RuntimeError: it would take what the factor shows for what it stores.
    """
    if torch.compiler.is_compiling():
        return ""
    host = str(sys._getframe(depth).f_globals.get("__name__", ""))
    if host.startswith(REPLACE) and not (view.owner is not None and view.owner.is_stock):
        raise RuntimeError(
            f"{host} would replace the weight of an adapter's factor by what it makes of the weight, and this method "
            "shows there what it computes from what is stored. Export the adapter with export_lora, and change the "
            "export."
        )
    return host


class _ViewedModule(nn.Module):
    """A LoRA factor whose `weight` is what its `view` makes of the parameter."""

    view: FactorView

    @property
    def weight(self) -> torch.Tensor:
        full = self._parameters.get("weight")
        if full is None and (full := self.__dict__.get("weight")) is None:
            raise AttributeError("weight")
        if asking_host(self.view).startswith(STORE):
            return full
        return self.view.of(real(self, "weight", full))

    # FSDP1 takes the parameter out and puts plain tensors in its place. It asks for them by name, and trains what it
    # is given.
    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        try:
            asking_host(self.view, depth=3)  # beyond nn.Module.__setattr__
        except RuntimeError:
            if (original := self._parameters.pop("weight_orig", None)) is not None:  # taken out before it asked
                self.register_parameter("weight", original)
            raise
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    # Two ways to change the parameter that no version counter shows for sure.
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.view.forget()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # .to(), .half(), .cuda()
        super()._apply(*args, **kwargs)
        self.view.forget()
        return self


def whole_factor(holder: nn.Module, name: str) -> torch.Tensor:
    """The stored factor: the parameter, or the tensor that FSDP1 put in its place."""
    parameter = holder._parameters.get(name)
    return holder.__dict__[name] if parameter is None else real(holder, name, parameter)


class ViewedLinear(_ViewedModule, nn.Linear):
    """`nn.Linear` that shows a view of its weight."""


class ViewedConv1d(_ViewedModule, nn.Conv1d):
    """`nn.Conv1d` that shows a view of its weight."""


class ViewedConv2d(_ViewedModule, nn.Conv2d):
    """`nn.Conv2d` that shows a view of its weight."""


class ViewedConv3d(_ViewedModule, nn.Conv3d):
    """`nn.Conv3d` that shows a view of its weight."""


VIEWED_CLASSES: dict[type[nn.Module], type[_ViewedModule]] = {
    nn.Linear: ViewedLinear,
    nn.Conv1d: ViewedConv1d,
    nn.Conv2d: ViewedConv2d,
    nn.Conv3d: ViewedConv3d,
}


class ViewedParameterDict(nn.ParameterDict):
    """Embedding factors: `factors[name]` is what is shown; `items()` and `values()` are the whole parameters."""

    views: dict[str, FactorView]

    def whole(self, key: str) -> nn.Parameter:
        return super().__getitem__(key)

    def __getitem__(self, key: str) -> Any:
        view = self.views.get(key)
        return self.whole(key) if view is None else view.of(self.whole(key))

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


# Every one alive, for checks of an optimizer that is about to step.
LIVE_VIEWS: WeakSet[LayerViews] = WeakSet()


class LayerViews:
    """The two views of one adapter in one layer.

    What they have computed holds as long as the stored factors have the values that they had. torch's version counters
    tell of most changes, but not of those through `.data` (an EMA's swap, `vector_to_parameters`, a soup), nor of
    writes to shared memory. So the values themselves are kept and compared; between two tokens of one decoding, where
    reading all of them would be felt, an eighth of the rows, another one at each token.

    Attributes:
        parts: (module that holds the parameter, the parameter's name there, its view), for A and for B.
        verified: inside a forward pass of the layer that has compared them.
    """

    def __init__(self, parts: tuple[tuple[nn.Module, str, Any], tuple[nn.Module, str, Any]]) -> None:
        self.parts = parts
        self.name = ""  # the module's, for messages
        self.verified = False
        self._part = 0
        self._seen: tuple[Any, list[torch.Tensor]] | None = None  # (versions, values) of what was computed from
        for _, _, view in parts:
            view.owner = self
        LIVE_VIEWS.add(self)

    @property
    def is_stock(self) -> bool:
        """Whether the layer always computes with the factors as they are stored."""
        return all(type(view) is FactorView and view.mixer is None for _, _, view in self.parts)

    @property
    def stores_vectors(self) -> bool:
        """Whether the factors are stored as vectors: the cores of tensor trains."""
        return all(factor.dim() == 1 for factor in self.factors())

    def factors(self) -> list[torch.Tensor]:
        """The stored A and B."""
        (holder_a, name_a, _), (holder_b, name_b, _) = self.parts
        return [whole_factor(holder_a, name_a), whole_factor(holder_b, name_b)]

    def stored(self) -> list[torch.Tensor]:
        """The same as they lie there, without those that a host has put away."""
        found = [holder._parameters.get(name, holder.__dict__.get(name)) for holder, name, _ in self.parts]
        return [tensor for tensor in found if tensor is not None]

    def sources(self) -> list[torch.Tensor]:
        """The stored A and B, and what else is shown with them."""
        (_, _, view_a), (_, _, view_b) = self.parts
        a, b = self.factors()
        return [*view_a.sources(a), *view_b.sources(b)]

    def remember(self) -> None:
        """Something was computed from the factors as they are now."""
        sources = self.sources()
        versions = [(id(tensor), tensor._version) for tensor in sources]
        if self._seen is not None and self._seen[0] == versions:
            return
        if any(is_sharded(tensor) or tensor.device.type == "meta" for tensor in sources):
            self._seen = None
            return
        with torch.inference_mode(False), torch.no_grad():
            self._seen = versions, [tensor.detach().clone() for tensor in sources]

    def has_changed(self, in_part: bool = False) -> bool:
        """Whether the factors, or the next part of them, have other values than what was computed from."""
        seen = self._seen
        if seen is None or self.verified or torch.compiler.is_compiling():
            return False
        before, after = seen[1], self.sources()
        if len(before) != len(after):
            return True
        if in_part:
            self._part = (self._part + 1) % 8
            before, after = [eighth(t, self._part) for t in before], [eighth(t, self._part) for t in after]
        return not all(map(same_values, before, after))

    def verify(self, in_part: bool = False) -> None:
        """Forget what was computed when the factors have changed since."""
        if self.has_changed(in_part):
            self.forget()

    def forget(self) -> None:
        """The factors may have changed."""
        self._seen = None
        for _, _, view in self.parts:
            view.kept = view.pending = None

    def enter(self, layer: LoraLayer, adapter_name: str) -> None:
        """A training forward pass of the layer begins."""
        for _, _, view in self.parts:
            view.in_forward, view.pending, view.kept = True, None, None

    def leave(self, layer: LoraLayer, adapter_name: str) -> None:
        """It is over, perhaps by an error."""
        for _, _, view in self.parts:
            view.in_forward, view.pending = False, None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": None, "verified": False}

    def __setstate__(self, state: dict[str, Any]) -> None:  # a deep copy or an unpickled one
        self.__dict__.update(state)
        LIVE_VIEWS.add(self)


def eighth(tensor: torch.Tensor, part: int) -> torch.Tensor:
    """The `part`-th eighth of the rows, all of them where there are fewer than eight."""
    rows = tensor.shape[0] // 8
    return tensor[part * rows : (part + 1) * rows if part < 7 else None] if rows else tensor


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same in all that is computed with them."""
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)


class Scaling(dict[str, float]):
    """The scale of each adapter in a layer, and the `lora_alpha / r` at which it was written.

    PEFT's `rescale_adapter_scale` keeps a copy and puts it back at its end. A rank that was set in between gives
    another `lora_alpha / r`, which then holds for what is put back too.
    """

    def __init__(self, values: dict[str, float], units: dict[str, float] | None = None) -> None:
        super().__init__(values)
        self.units = dict(units or {})

    def copy(self) -> Scaling:
        return Scaling(self, self.units)


class ViewedLayer:
    """Mixed into PEFT's LoRA layer classes: tells the views of a training forward pass.

    Per layer rather than for the whole model, since gradient checkpointing calls the layers again in the backward pass,
    when the model's own forward pass is over.
    """

    @property
    def scaling(self: Any) -> Scaling:
        """PEFT's: adapter name -> scale."""
        found: Scaling = self.__dict__["_scaling"]
        return found

    @scaling.setter
    def scaling(self: Any, values: dict[str, float]) -> None:
        units = {name: self.lora_alpha[name] / self.r[name] for name in self.lora_views}
        put_back = values.units if isinstance(values, Scaling) else {}
        scales = {
            name: scale
            if put_back.get(name, units.get(name)) == units.get(name)
            else scale * units[name] / put_back[name]
            for name, scale in values.items()
        }
        self.__dict__["_scaling"] = Scaling(scales, units)

    def enable_adapters(self: Any, enabled: bool) -> None:
        super().enable_adapters(enabled)  # type: ignore[misc]  # object has none; LoraLayer has
        enable_also(self, enabled)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training or self.merged:
            return self._infer(*args, **kwargs)
        for part in _layers_of(self):
            for name, views in part.lora_views.items():
                views.enter(part, name)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # as above
        finally:
            for part in _layers_of(self):
                for name, views in part.lora_views.items():
                    views.leave(part, name)

    def _infer(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A forward pass that is not trained: what was computed before is compared with the factors once."""
        kept = (
            []
            if torch.is_grad_enabled() or torch.compiler.is_compiling()
            else [views for part in _layers_of(self) for views in part.lora_views.values() if views._seen is not None]
        )
        if not kept:
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # object has no forward; LoraLayer has
        in_part = bool(args) and _is_a_decoded_token(args[0])
        for views in kept:
            views.verify(in_part)
            views.verified = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # as above
        finally:
            for views in kept:
                views.verified = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, which pickle and deepcopy cannot find by name; its base can be.
        return _empty_viewed_layer, (type(self).__mro__[2],), self.__dict__


def _is_a_decoded_token(x: Any) -> bool:
    """Whether this is one token of each row: (batch, 1, features), or (batch, 1) ids."""
    return isinstance(x, torch.Tensor) and x.dim() == 2 + x.is_floating_point() and x.shape[1] == 1


def _empty_viewed_layer(base: type) -> Any:
    return object.__new__(viewed_layer_class(base))


@cache
def viewed_layer_class(base: type) -> type:
    """`base` with `ViewedLayer` in front; under the same name, by which PEFT looks for some of its classes."""
    return types.new_class(base.__name__, (ViewedLayer, base), exec_body=lambda body: body.update(__module__=__name__))


def _layers_of(layer: LoraLayer) -> tuple[LoraLayer, ...]:
    # MultiheadAttention computes with its out_proj's factors without calling out_proj.
    return (layer, layer.get_base_layer().out_proj) if isinstance(layer, MultiheadAttention) else (layer,)


def is_viewed(layer: nn.Module, adapter_name: str) -> bool:
    """Whether the layer has this adapter, and it is one of ours."""
    return adapter_name in getattr(layer, "lora_views", ())


def viewed_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """(name, layer) of each layer of `model` that has this adapter of ours."""
    return ((name, module) for name, module in model.named_modules() if is_viewed(module, adapter_name))


def layout(layer: LoraLayer) -> tuple[tuple[int, int], tuple[int, int], int]:
    """`groups` of A's view, `groups` of B's, and their `divisor`: PEFT stores experts and groups in ways of its own."""
    if isinstance(layer, ParamWrapper):
        return (layer.num_experts, 1), (1, layer.num_experts), 1
    groups = getattr(layer.get_base_layer(), "groups", 1)
    return (groups, 1), (1, 1), groups


def install(
    layer: LoraLayer, adapter_name: str, method: str, view_a: FactorView, view_b: FactorView
) -> tuple[tuple[nn.Module, str, FactorView], tuple[nn.Module, str, FactorView]]:
    """Put the views into the adapter's factors in a LoRA layer; returns the `parts` of its `LayerViews`.

    Raises:
        ValueError: the layer's backend keeps its factors in modules that cannot show a view.
    """
    if adapter_name in layer.lora_A:
        modules = (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
        base_layer = layer.get_base_layer()
        for module, view in zip(modules, (view_a, view_b), strict=True):
            viewed = VIEWED_CLASSES.get(type(module))
            if viewed is None or getattr(base_layer, "_hf_tp_plan", None) is not None:
                raise ValueError(
                    f"{method} does not support {type(layer).__name__} over {type(base_layer).__name__}: its LoRA "
                    f"factors are {type(module).__name__} modules, possibly sharded, of which nothing else can be "
                    "shown. Leave the layer out of target_modules."
                )
            module.view = view
            module.__class__ = viewed
        return (modules[0], "weight", view_a), (modules[1], "weight", view_b)
    dicts = (layer.lora_embedding_A, layer.lora_embedding_B)
    for factors, view in zip(dicts, (view_a, view_b), strict=True):
        if not isinstance(factors, ViewedParameterDict):
            factors.views = {}
            factors.__class__ = ViewedParameterDict
        factors.views[adapter_name] = view
    return (dicts[0], adapter_name, view_a), (dicts[1], adapter_name, view_b)


def attach(layer: LoraLayer, adapter_name: str, views: LayerViews) -> None:
    """Let the layer tell these views of its forward passes, and drop them with the adapter."""
    if not hasattr(layer, "lora_views"):
        layer.lora_views = {}
        layer.other_param_names = (*layer.other_param_names, "lora_views")
        cls: Any = type(layer)
        layer.__dict__["_scaling"] = Scaling(layer.__dict__.pop("scaling"))
        layer.__class__ = viewed_layer_class(cls)
    layer.lora_views[adapter_name] = views
    note_unit(layer, adapter_name)


def note_unit(layer: Any, adapter_name: str) -> None:
    """The adapter's scale in this layer was written for the `lora_alpha` and `r` that are set."""
    layer.scaling.units[adapter_name] = layer.lora_alpha[adapter_name] / layer.r[adapter_name]


def enable_also(layer: Any, enabled: bool) -> None:
    """Turn on and off what an adapter trains beside its layers, with one of these: transformers forgets the first."""
    for wrapper in layer.__dict__.get("also_trained", ()):
        wrapper.enable_adapters(enabled)


def keep_together(model: nn.Module, kind: type[nn.Module]) -> None:
    """Let the first layer of this kind turn on and off the modules that adapters train as a whole."""
    first = next((module for module in model.modules() if isinstance(module, kind)), None)
    if first is not None:
        wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        first.__dict__["also_trained"] = wrappers


def active_adapter(model: nn.Module, adapter_name: str | None = None) -> str:
    """The named adapter of ours, or the first active one; raises ValueError, with the names there are, for none."""
    known: dict[str, None] = {}
    active: dict[str, None] = {}
    layer: Any
    for layer in model.modules():
        ours = getattr(layer, "lora_views", {})
        if not ours:
            continue
        known.update(dict.fromkeys(ours))
        active.update((name, None) for name in layer.active_adapters if name in ours)
    if not known:
        raise ValueError(
            "the model has no adapter of peft_dynamic that is made of LoRA layers. Add one, e.g. with "
            "get_peft_model(model, DyLoRAConfig(...))."
        )
    if adapter_name is None and not active:
        raise ValueError(f"no adapter of peft_dynamic is active. Pass adapter_name, one of {sorted(known)}.")
    if adapter_name is not None and adapter_name not in known:
        raise ValueError(
            f"adapter_name={adapter_name!r} is no adapter of peft_dynamic in the model; it has {sorted(known)}."
        )
    return adapter_name if adapter_name is not None else next(iter(active))
