"""The state of an adapter in a layer, which computes its factors, and the layers that tell it of their passes.

A factor's weight (`computed.py`) is a look-up here: in a training forward pass it is computed once, in inference it is
kept until the stored tensors change, and everywhere else it is computed anew.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peft_dynamic.hosts.deepspeed import gather_with, is_imported, is_parted
from peft_dynamic.hosts.offload import is_sharded
from peft_dynamic.tuners.computed import (
    COMPUTED_CLASSES,
    ComputedConv1d,
    ComputedConv2d,
    ComputedConv3d,
    ComputedFactor,
    ComputedLinear,
    ComputedParameterDict,
    Part,
    stored_factor,
)
from peft_dynamic.tuners.computed import install as install  # was here before
from peft_dynamic.tuners.computed import layout as layout  # likewise

# Every one alive. Weak, and filled when one is made, copied or unpickled.
LIVE_STATES: WeakSet[LayerState] = WeakSet()
_live_lock = threading.Lock()


def live_states() -> list[LayerState]:
    """Every state alive, for what an optimizer that steps has to know."""
    with _live_lock:  # another thread may be making a model
        return list(LIVE_STATES)


def _enlist(state: LayerState) -> None:
    with _live_lock:
        LIVE_STATES.add(state)


class LayerState:
    """The two factors of one adapter in one layer, and what was computed of them.

    What was computed holds as long as the stored factors have the values that they had. torch's version counters
    tell of most changes, but not of those through `.data` (an EMA's swap, `vector_to_parameters`, a soup), nor of
    writes to shared memory. So the values themselves are kept and compared; between two tokens of one decoding, where
    reading all of them would be felt, an eighth of the rows, another one at each token.

    Attributes:
        parts: (module that holds the parameter, the parameter's name there, how its weight is made), for A and for B.
        frozen: whether the stored factors are never trained.
        verified: inside a forward pass of the layer that has compared them.
        in_forward: inside a training forward pass of the layer.
    """

    frozen = False

    def __init__(self, parts: tuple[Part, Part]) -> None:
        self.parts = parts
        self.name = ""  # the module's, for messages
        self.verified = False
        self.in_forward = False
        self._part = 0
        self._kept: dict[int, tuple[Any, torch.Tensor]] = {}  # dim -> (key, weight) of the last inference
        self._pending: dict[int, torch.Tensor] = {}  # dim -> weight of this training forward pass
        self._seen: tuple[Any, list[torch.Tensor]] | None = None  # (versions, values) of what was computed from
        for _, _, factor in parts:
            factor.owner = self
        _enlist(self)

    @property
    def is_stock(self) -> bool:
        """Whether the layer always computes with the factors as they are stored."""
        return all(factor.is_stock for _, _, factor in self.parts)

    @property
    def stores_vectors(self) -> bool:
        """Whether the factors are stored as vectors: the cores of tensor trains."""
        return all(factor.dim() == 1 for factor in self.factors())

    def factors(self) -> list[torch.Tensor]:
        """The stored A and B."""
        (holder_a, name_a, _), (holder_b, name_b, _) = self.parts
        return [stored_factor(holder_a, name_a), stored_factor(holder_b, name_b)]

    def stored(self) -> list[torch.Tensor]:
        """The same as they lie there, without those that a host has put away."""
        tensors = [holder._parameters.get(name, holder.__dict__.get(name)) for holder, name, _ in self.parts]
        return [tensor for tensor in tensors if tensor is not None]

    def sources(self) -> list[torch.Tensor]:
        """The stored A and B, and what else is computed with them."""
        (_, _, factor_a), (_, _, factor_b) = self.parts
        a, b = self.factors()
        return [*factor_a.sources(a), *factor_b.sources(b)]

    def look_up(self, factor: ComputedFactor, full: torch.Tensor) -> torch.Tensor:
        """The weight of a factor whose stored tensor is `full`."""
        if factor.is_plain():
            return full
        if not factor.keeps:
            return factor.compute(full)
        if torch.compiler.is_compiling():
            return factor.anew(full)
        self.check_gathered([full])
        if torch.is_grad_enabled():
            if not self.in_forward:
                return factor.anew(full)
            weight = self._pending.get(factor.dim)
            if weight is None:  # PEFT asks for the weight's dtype, then for the weight
                weight = self._pending[factor.dim] = factor.anew(full)
            return weight
        self.verify()
        key = factor.state_key(full)
        kept = self._kept.get(factor.dim)
        if kept is None or kept[0] != key:
            self._kept[factor.dim] = kept = (key, factor.anew(full))
            self.remember()
        return kept[1]

    def check_gathered(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise RuntimeError where ZeRO-3 holds one of these in parts."""
        if any(map(is_parted, tensors)):
            raise RuntimeError(
                f"DeepSpeed ZeRO-3 holds the factors of {self.name or 'a layer'} in parts, and gathers them for the "
                "layer's forward and backward pass alone. Save the adapter with trainer.save_model, which gathers them "
                "on every process, and load or export what it wrote."
            )

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

    @property
    def remembers(self) -> bool:
        """Whether anything is kept that a change of the factors would make wrong."""
        return self._seen is not None

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
        self._kept, self._pending = {}, {}

    def begin_forward(self, layer: LoraLayer, adapter_name: str) -> None:
        """A training forward pass of the layer begins."""
        self.in_forward = True
        self._kept, self._pending = {}, {}

    def end_forward(self, layer: LoraLayer, adapter_name: str) -> None:
        """It is over, perhaps by an error."""
        self.in_forward = False
        self._pending = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": None, "_kept": {}, "_pending": {}, "verified": False, "in_forward": False}

    def __setstate__(self, state: dict[str, Any]) -> None:  # a deep copy or an unpickled one
        self.__dict__.update(state)
        _enlist(self)


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


class ComputedLayer:
    """Mixed into PEFT's LoRA layer classes: tells the states of their forward passes.

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

    def _freeze_non_trainable_peft_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        super()._freeze_non_trainable_peft_weights(*args, **kwargs)  # type: ignore[misc]  # as above
        for state in self.lora_views.values():
            for factor in state.factors() if state.frozen else ():
                if factor.is_leaf:
                    factor.requires_grad_(False)

    def get_delta_weight(self: Any, adapter: str, *args: Any, **kwargs: Any) -> Any:
        with reading(self):
            return super().get_delta_weight(adapter, *args, **kwargs)  # type: ignore[misc]  # as above

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and is_imported():
            gather_with(self, _computed_from(self))
        if not self.training or self.merged:
            return self._infer(*args, **kwargs)
        for part in _layers_of(self):
            for name, state in part.lora_views.items():
                state.begin_forward(part, name)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # as above
        finally:
            for part in _layers_of(self):
                for name, state in part.lora_views.items():
                    state.end_forward(part, name)

    def _infer(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A forward pass that is not trained: what was computed before is compared with the factors once."""
        kept = (
            []
            if torch.is_grad_enabled() or torch.compiler.is_compiling()
            else [state for part in _layers_of(self) for state in part.lora_views.values() if state.remembers]
        )
        if not kept:
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # object has no forward; LoraLayer has
        in_part = bool(args) and _is_a_decoded_token(args[0])
        for state in kept:
            state.verify(in_part)
            state.verified = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # as above
        finally:
            for state in kept:
                state.verified = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, which pickle and deepcopy cannot find by name; its base can be.
        return _empty_layer, (type(self).__mro__[2],), self.__dict__


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """PEFT computes with the factors of this layer or model: offloaded ones too are what they compute meanwhile."""
    factors = [
        factor
        for module in model.modules()
        for state in getattr(module, "lora_views", {}).values()
        for _, _, factor in state.parts
    ]
    before = [factor.is_read for factor in factors]
    for factor in factors:
        factor.is_read = True
    try:
        yield
    finally:
        for factor, was_read in zip(factors, before, strict=True):
            factor.is_read = was_read


def _is_a_decoded_token(x: Any) -> bool:
    """Whether this is one token of each row: (batch, 1, features), or (batch, 1) ids."""
    return isinstance(x, torch.Tensor) and x.dim() == 2 + x.is_floating_point() and x.shape[1] == 1


def _empty_layer(base: type) -> Any:
    return object.__new__(computed_layer_class(base))


@cache
def computed_layer_class(base: type) -> type:
    """`base` with `ComputedLayer` in front; under the same name, by which PEFT looks for some of its classes."""
    return types.new_class(
        base.__name__, (ComputedLayer, base), exec_body=lambda body: body.update(__module__=__name__)
    )


def _layers_of(layer: LoraLayer) -> tuple[LoraLayer, ...]:
    # MultiheadAttention computes with its out_proj's factors without calling out_proj.
    return (layer, layer.get_base_layer().out_proj) if isinstance(layer, MultiheadAttention) else (layer,)


def _computed_from(layer: LoraLayer) -> Iterator[torch.Tensor]:
    """What the factors of the layer are computed from, which DeepSpeed would gather for modules of their own."""
    for part in _layers_of(layer):
        for state in part.lora_views.values():
            yield from state.sources()


def is_viewed(layer: nn.Module, adapter_name: str) -> bool:
    """Whether the layer has this adapter, and it is one of ours."""
    return adapter_name in getattr(layer, "lora_views", ())


def viewed_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """(name, layer) of each layer of `model` that has this adapter of ours."""
    return ((name, module) for name, module in model.named_modules() if is_viewed(module, adapter_name))


def attach(layer: LoraLayer, adapter_name: str, state: LayerState) -> None:
    """Let the layer tell the state of its forward passes, and drop it with the adapter."""
    if not hasattr(layer, "lora_views"):
        layer.lora_views = {}
        layer.other_param_names = (*layer.other_param_names, "lora_views")
        cls: Any = type(layer)
        layer.__dict__["_scaling"] = Scaling(layer.__dict__.pop("scaling"))
        layer.__class__ = computed_layer_class(cls)
    layer.lora_views[adapter_name] = state
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


# The names of before.
FactorView, LayerViews, LIVE_VIEWS, ViewedLayer = ComputedFactor, LayerState, LIVE_STATES, ComputedLayer
ViewedLinear, ViewedConv1d, ViewedConv2d, ViewedConv3d = ComputedLinear, ComputedConv1d, ComputedConv2d, ComputedConv3d
VIEWED_CLASSES, ViewedParameterDict, whole_factor = COMPUTED_CLASSES, ComputedParameterDict, stored_factor
viewed_layer_class = computed_layer_class
