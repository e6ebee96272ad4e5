"""A stock LoRA adapter at a lower rank: its layers become ranked ones for as long as a rank below the full one holds.

The stored factors stay as they are: what is saved meanwhile is the whole adapter, and training goes on at the full
rank.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils import hotswap
from torch import nn

from peft_dynamic.tuners.computed import COMPUTED_CLASSES, ComputedModule, ComputedParameterDict
from peft_dynamic.tuners.dylora.config import DyLoRAConfig
from peft_dynamic.tuners.dylora.layer import make_ranked, ranked_layers
from peft_dynamic.tuners.dylora.schedule import RankSchedule
from peft_dynamic.tuners.dylora.steps import RankedPassHooks
from peft_dynamic.tuners.lora_fields import check_product

STOCK_CLASSES = {computed: stock for stock, computed in COMPUTED_CLASSES.items()}
_changing = threading.RLock()


class WholeSchedule(RankSchedule):
    """Of a stock LoRA: every training step is at the full rank, and no rank below it was trained."""

    stock = True

    def __init__(self, rank: int) -> None:
        self.config = DyLoRAConfig(r=rank, ranks=[rank], rank_sampling="full")
        super().__init__(self.config)
        self.users = 0  # blocks and calls that need the layers ranked

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"users": 0}


class CutHooks(RankedPassHooks):
    """Hooks that go when the layers are gone, by PEFT's merge_and_unload, unload or delete_adapter.

    Args:
        schedule: of the adapter.
        layer: one of its layers.
        adapter_name: the adapter.
    """

    def __init__(self, schedule: WholeSchedule, layer: Any, adapter_name: str) -> None:
        super().__init__(schedule)
        self.layer, self.adapter_name = weakref.ref(layer), adapter_name

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        layer = self.layer()
        if layer is None or adapter_gone(layer, self.adapter_name, self.schedule):
            remove_hooks(module, self.schedule)
        else:
            super().enter(module, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> RankedPassHooks:
        schedule, layer = copy.deepcopy(self.schedule, memo), self.layer()
        if layer is None or not isinstance(schedule, WholeSchedule):
            return RankedPassHooks(schedule)
        return CutHooks(schedule, copy.deepcopy(layer, memo), self.adapter_name)

    def __reduce__(self) -> Any:  # an unpickled model's hooks stay: its layers have no name here
        return RankedPassHooks, (self.schedule,)


def adapter_gone(layer: Any, adapter_name: str, schedule: RankSchedule) -> bool:
    """Whether the layer no longer has the adapter with this schedule."""
    state = layer.__dict__.get("lora_views", {}).get(adapter_name)
    return state is None or state.schedule is not schedule


def remove_hooks(root: nn.Module, schedule: RankSchedule) -> None:
    """Take the hooks of this schedule off a model."""
    kinds: list[tuple[Any, list[Any]]] = [
        (root._forward_pre_hooks, [root._forward_pre_hooks_with_kwargs]),
        (root._forward_hooks, [root._forward_hooks_with_kwargs, root._forward_hooks_always_called]),
    ]
    for hooks, more in kinds:
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, RankedPassHooks) and owner.schedule is schedule:
                hooks.pop(key)
                for each in more:
                    each.pop(key, None)


def stock_layers(model: nn.Module, adapter_name: str | None = None) -> list[tuple[str, Any]]:
    """(name, layer) of each layer with a LoRA adapter of PEFT's own type, or with the named one."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return []
    stock = {name for name, config in configs.items() if getattr(config, "peft_type", None) == "LORA"}
    wanted = stock if adapter_name is None else stock & {adapter_name}
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and any(adapter in wanted for adapter in adapters_of(module))
    ]


def adapters_of(layer: LoraLayer) -> list[str]:
    """The names of the adapters in a layer."""
    return [*layer.lora_A, *layer.lora_embedding_A]


def hold(model: nn.Module, adapter_name: str) -> WholeSchedule | None:
    """Let the layers of a stock LoRA be ranked until `release`; None for an adapter that is ranked by itself.

    Raises:
        ValueError: the adapter is more than a product of two factors, or one of its layers is.
    """
    with _changing:
        for _, layer in ranked_layers(model, adapter_name):
            schedule = layer.lora_views[adapter_name].schedule
            if not isinstance(schedule, WholeSchedule):
                return None
            schedule.users += 1
            return schedule
        schedule = _make_ranked(model, adapter_name)
        schedule.users += 1
        return schedule


def release(model: nn.Module, adapter_name: str, schedule: WholeSchedule | None) -> None:
    """Make them PEFT's own again, if nobody needs them and all are at their full rank."""
    if schedule is None:
        return
    with _changing:
        schedule.users -= 1
        layers = [layer for _, layer in ranked_layers(model, adapter_name)]
        states = [layer.lora_views[adapter_name] for layer in layers]
        if not schedule.users and all(state.rank == state.max_rank for state in states):
            _make_stock(layers, adapter_name)
            remove_hooks(_root(model), schedule)


def _make_ranked(model: Any, adapter_name: str) -> WholeSchedule:
    layers = stock_layers(model, adapter_name)
    check_product(model.peft_config[adapter_name], f"the adapter {adapter_name!r}")
    for name, layer in layers:
        variant = layer.lora_variant.get(adapter_name)
        if variant is not None or layer.lora_bias.get(adapter_name, False):
            what = type(variant).__name__ if variant is not None else "lora_bias"
            raise ValueError(
                f"the adapter {adapter_name!r} has {what} at {name!r}, so its update is more than the product of its "
                "factors and has no lower rank. Merge it into the base model."
            )
        if isinstance(layer.scaling[adapter_name], torch.Tensor):
            raise ValueError(
                f"the factors of the adapter {adapter_name!r} were replaced (prepare_model_for_compiled_hotswap pads "
                "them), so it has no lower rank. Set the rank, or call resize_adapter, before that."
            )
    schedule = WholeSchedule(max(layer.r[adapter_name] for _, layer in layers))
    done = []
    try:
        for name, layer in layers:
            done.append(layer)
            _rank_layer(layer, adapter_name, schedule)
            layer.lora_views[adapter_name].name = name
    except BaseException:
        _make_stock(done, adapter_name)
        raise
    CutHooks(schedule, layers[0][1], adapter_name).register(_root(model))
    return schedule


def _root(model: Any) -> nn.Module:
    root: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return root


def _rank_layer(layer: Any, adapter_name: str, schedule: WholeSchedule) -> None:
    scale, alpha, rank = layer.scaling[adapter_name], layer.lora_alpha[adapter_name], layer.r[adapter_name]
    rs = layer.use_rslora.get(adapter_name, False)
    if rs:  # the alpha of the plain LoRA that it is
        layer.lora_alpha[adapter_name] = alpha * rank**0.5
        layer.use_rslora[adapter_name] = False
    layer.__dict__.setdefault("stock_alpha", {})[adapter_name] = (alpha, rs)
    make_ranked(layer, adapter_name, schedule, schedule.config)
    layer.scaling[adapter_name] = scale  # a factor of set_scale's among it


def _make_stock(layers: Iterable[Any], adapter_name: str) -> None:
    for layer in layers:
        for factors in (layer.lora_A, layer.lora_B):
            if adapter_name in factors and isinstance(module := factors[adapter_name], ComputedModule):
                module.__class__ = STOCK_CLASSES[type(module)]  # type: ignore[assignment]  # what it was made of
                del module.view
        for factors in (layer.lora_embedding_A, layer.lora_embedding_B):
            if isinstance(factors, ComputedParameterDict):
                factors.views.pop(adapter_name, None)
                if not factors.views:
                    del factors.views
                    factors.__class__ = nn.ParameterDict  # type: ignore[assignment]  # likewise
        detach(layer, adapter_name)
        alphas = layer.__dict__.get("stock_alpha", {})
        if adapter_name in alphas:
            layer.lora_alpha[adapter_name], layer.use_rslora[adapter_name] = alphas.pop(adapter_name)
        if not alphas:
            layer.__dict__.pop("stock_alpha", None)


def detach(layer: Any, adapter_name: str) -> None:
    """Take back what `tuners.factors.attach` did."""
    views = layer.__dict__.get("lora_views", {})
    views.pop(adapter_name, None)
    if "lora_views" in layer.__dict__ and not views:
        del layer.lora_views
        scaling, names = dict(layer.__dict__.pop("_scaling")), layer.__dict__.pop("other_param_names")
        layer.__class__ = type(layer).__mro__[2]
        layer.scaling = scaling
        if (rest := tuple(name for name in names if name != "lora_views")) != layer.other_param_names:
            layer.other_param_names = rest


def _whole_only(stock: Any, what: str) -> Any:
    """PEFT's function, which writes into the factors that a layer shows: refused while a LoRA shows a part of them."""

    @wraps(stock)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, layer in ranked_layers(model):
            for adapter_name, state in layer.lora_views.items():
                if isinstance(getattr(state, "schedule", None), WholeSchedule):
                    raise ValueError(
                        f"{what}: the LoRA adapter {adapter_name!r} is at a lower rank ({name}), and this would write "
                        "into the part in use. Call set_rank with its full rank first."
                    )
        return stock(model, *args, **kwargs)

    vars(call)["of_peft_dynamic"] = True  # a second import of this file wraps nothing twice
    return call


for _name in ("hotswap_adapter", "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap"):
    if not hasattr(getattr(hotswap, _name), "of_peft_dynamic"):
        setattr(hotswap, _name, _whole_only(getattr(hotswap, _name), _name))
