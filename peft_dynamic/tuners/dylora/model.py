"""DyLoRA's tuner: PEFT's `LoraModel`, whose layers are made ranked, with `set_rank`, `get_rank` and `at_rank`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn

from peft_dynamic.tuners.quantization import keep_training_on_cpu

from .config import DyLoRAConfig
from .layer import make_ranked, ranked_layers, set_layer_rank
from .schedule import RankSchedule


class DyLoRAModel(LoraModel):
    """A model with DyLoRA adapters, made by `get_peft_model(model, DyLoRAConfig(...))`.

    In a training forward pass (train mode, gradients on) every layer uses the rank drawn for this optimizer step.
    Everywhere else (eval mode, `generate`, no gradients, merge, export) it uses the rank of `set_rank`.

    Source: Valipour et al., EACL 2023, arXiv 2210.07558; the authors' code huawei-noah/Efficient-NLP, folder DyLoRA.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, and all or nothing: when a layer is refused, the model is left as it was."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self._roll_back(model, adapter_name)
            raise
        schedule = self._schedule(adapter_name)
        self._root_hooks()[adapter_name] = [
            model.register_forward_pre_hook(schedule.enter_model),
            model.register_forward_hook(schedule.leave_model, always_call=True),
        ]
        keep_training_on_cpu(model)

    def _create_and_replace(
        self,
        lora_config: DyLoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        schedule = self._schedule(adapter_name)
        made = 0
        # Two roots: a further adapter goes into `target`, which may lie inside nested ParamWrappers. And all modules
        # below, since MultiheadAttention holds a LoRA layer for its out_proj. In this order the first layer, which
        # carries the step number, is the same one for each adapter, so that checkpoints fit.
        for module in (*getattr(parent, target_name).modules(), *target.modules()):
            if not isinstance(module, LoraLayer) or adapter_name in getattr(module, "lora_ranks", ()):
                continue
            if adapter_name in module.lora_A or adapter_name in module.lora_embedding_A:
                make_ranked(module, adapter_name, schedule, lora_config)
                self._keep_in_state_dict(schedule, module, adapter_name)
                made += 1
        if not made:
            raise ValueError(
                f"DyLoRA cannot cut {type(getattr(parent, target_name)).__name__} at {current_key!r} to a rank: it has "
                "no lora_A and lora_B. Leave the module out of target_modules."
            )

    def _keep_in_state_dict(self, schedule: RankSchedule, layer: LoraLayer, adapter_name: str) -> None:
        # One layer carries the step number, as one of its adapter modules: PEFT saves, loads, moves and deletes it.
        if adapter_name in self.__dict__.setdefault("_schedule_holders", set()):
            return
        self._schedule_holders.add(adapter_name)
        if not hasattr(layer, "lora_schedule"):
            layer.lora_schedule = nn.ModuleDict()
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_schedule")
        layer.lora_schedule[adapter_name] = schedule

    def _schedule(self, adapter_name: str) -> RankSchedule:
        schedules: dict[str, RankSchedule] = self.__dict__.setdefault("_schedules", {})
        if adapter_name not in schedules:
            schedules[adapter_name] = RankSchedule(self.peft_config[adapter_name])
        return schedules[adapter_name]

    def _root_hooks(self) -> dict[str, list[Any]]:
        return self.__dict__.setdefault("_hooks_of_adapters", {})

    def _forget(self, adapter_name: str) -> None:
        for handle in self._root_hooks().pop(adapter_name, []):
            handle.remove()
        self.__dict__.get("_schedules", {}).pop(adapter_name, None)
        self.__dict__.get("_schedule_holders", set()).discard(adapter_name)

    def _roll_back(self, model: nn.Module, adapter_name: str) -> None:
        self._forget(adapter_name)
        if len(self.peft_config) > 1:
            for _, module in list(model.named_modules()):
                if isinstance(module, LoraLayer):
                    module.delete_adapter(adapter_name)
        else:
            self._unload_and_optionally_merge(merge=False)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for adapter_name in list(self._root_hooks()):
            self._forget(adapter_name)
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's, and refuse an incomplete or misshapen checkpoint before any of it is loaded."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if ".lora_" in name and (f".{adapter_name}." in name or name.endswith(f".{adapter_name}"))
        }
        # on a model with injected adapters the checkpoint has a prefix that the model lacks
        found = {name.removeprefix("base_model.model."): value for name, value in remapped.items()}
        missing = [name for name in expected if name.removeprefix("base_model.model.") not in found]
        if missing and not any(hasattr(parameter, "placements") for parameter in model.parameters()):
            raise ValueError(
                f"the checkpoint for the adapter {adapter_name!r} lacks {len(missing)} of its {len(expected)} tensors, "
                f"{missing[0]} among them. It is incomplete, or was made with other target_modules. Nothing was loaded."
            )
        for name, shape in expected.items():
            value = found.get(name.removeprefix("base_model.model."))
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"the checkpoint for the adapter {adapter_name!r} has {name} of shape {tuple(value.shape)}, the "
                    f"model needs {shape}: it was made with another r or for another base model. Nothing was loaded."
                )
        return remapped

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's, over the adapters at their set ranks. The new adapter has one rank and a constant scale of 1."""
        configs = {name: self.peft_config[name] for name in adapters if name in self.peft_config}
        try:
            for name, config in configs.items():
                # PEFT sizes the new adapter by r, and needs lora_alpha = r to be a scale of 1
                ranks = [layer.r[name] for _, layer in ranked_layers(self.model, name)]
                self.peft_config[name] = replace(
                    config,
                    r=max(ranks),
                    ranks=None,
                    rank_sampling="uniform",
                    rank_pattern={},
                    scaling="alpha/r",
                )
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self.peft_config.update(configs)

    def set_rank(self, rank: int | dict[str, int], adapter_name: str | None = None) -> None:
        """Use `rank` outside training; see `peft_dynamic.tuners.dylora.set_rank`."""
        set_rank(self.model, rank, adapter_name)

    def get_rank(self, adapter_name: str | None = None) -> int | dict[str, int]:
        """The rank outside training: an int, or a dict from module name to rank where modules differ."""
        return get_rank(self.model, adapter_name)

    def at_rank(self, rank: int | dict[str, int], adapter_name: str | None = None) -> Any:
        """`with model.at_rank(rank):` uses that rank inside the block and goes back after it, also on an error."""
        return at_rank(self.model, rank, adapter_name)


def _dynamic_adapters(model: nn.Module, adapter_name: str | None) -> list[str]:
    """The named adapter, or the active ones, that have ranks."""
    known: dict[str, None] = {}
    active: dict[str, None] = {}
    for _, layer in ranked_layers(model):
        known.update(dict.fromkeys(layer.lora_ranks))
        active.update(dict.fromkeys(name for name in layer.active_adapters if name in layer.lora_ranks))
    if not known:
        raise ValueError("the model has no DyLoRA adapter. Add one with get_peft_model(model, DyLoRAConfig(...)).")
    if adapter_name is None:
        if not active:
            raise ValueError(
                f"no DyLoRA adapter is active. Pass adapter_name, one of {sorted(known)}, or call set_adapter."
            )
        return list(active)
    if adapter_name not in known:
        raise ValueError(f"adapter_name={adapter_name!r} is no DyLoRA adapter of the model; it has {sorted(known)}.")
    return [adapter_name]


def active_adapter(model: nn.Module, adapter_name: str | None = None) -> str:
    """The named DyLoRA adapter, or the first active one; raises ValueError, with the names there are, for none."""
    return _dynamic_adapters(model, adapter_name)[0]


def _ranks_of_layers(model: nn.Module, rank: int | dict[str, int], adapter_name: str) -> dict[str, int]:
    """Module name -> rank asked for, checked in whole before anything is changed."""
    layers: dict[str, Any] = dict(ranked_layers(model, adapter_name))
    if isinstance(rank, dict):
        wanted = {}
        used = set()
        for name in layers:
            key = get_pattern_key(list(rank), name)
            if key in rank:
                wanted[name] = rank[key]
                used.add(key)
        unused = sorted(set(rank) - used)
        if unused:
            raise ValueError(
                f"rank={rank!r}: {unused} match no module of the adapter {adapter_name!r}. A key is the end of a "
                f"module's name, or a regular expression, as in rank_pattern; names are like {next(iter(layers))!r}."
            )
    else:
        wanted = dict.fromkeys(layers, rank)
    for name, value in wanted.items():
        ranks = layers[name].lora_ranks[adapter_name]
        # a cap of rank_pattern holds for one rank for all modules; a rank given to the module itself must fit it
        limit = ranks.max_rank if isinstance(rank, dict) else ranks.schedule.ranks[-1]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"rank must be an int or a dict of module patterns to ints, got {rank!r}.")
        if not 1 <= value <= limit:
            raise ValueError(f"rank={value} for {name!r} is outside 1..{limit}, the ranks of adapter {adapter_name!r}.")
    return wanted


def set_rank(model: nn.Module, rank: int | dict[str, int], adapter_name: str | None = None) -> None:
    """Use `rank` for evaluation, generation, merging and export from now on; training goes on drawing its own.

    The rank is a setting of the model at hand and is not saved: an adapter holds all its ranks and loads at r.

    Works on a `PeftModel` and on a transformers model with adapters added by `add_adapter` or `load_adapter`.

    Args:
        model: the model with DyLoRA adapters.
        rank: the rank of all modules, from 1 to r (a module capped by `rank_pattern` uses its cap where that is less);
            or a dict from module names (their ends, or regular expressions, as in `rank_pattern`) to ranks, which
            leaves the modules it does not name as they are.
        adapter_name: the adapter, or None for every active one.

    Raises:
        ValueError: a rank outside 1..r, a key that matches no module, or a merged adapter. Nothing is changed then.
        TypeError: a rank that is no int.

    Warns once for each rank that training never draws.
    """
    for name in _dynamic_adapters(model, adapter_name):
        _apply_rank(model, rank, name)


def _apply_rank(model: nn.Module, rank: int | dict[str, int], adapter_name: str) -> None:
    wanted = _ranks_of_layers(model, rank, adapter_name)
    layer: Any
    for name, layer in ranked_layers(model, adapter_name):
        if name in wanted:
            _warn_if_untrained(layer.lora_ranks[adapter_name].schedule, wanted[name])
            set_layer_rank(layer, adapter_name, wanted[name])


def _warn_if_untrained(schedule: RankSchedule, rank: int) -> None:
    if rank in schedule.ranks or rank in schedule.warned:
        return
    schedule.warned.add(rank)
    warnings.warn(
        f"rank {rank} is not one of the trained ranks {list(schedule.ranks)}: it works, but was not trained.",
        stacklevel=4,
    )


def get_rank(model: nn.Module, adapter_name: str | None = None) -> int | dict[str, int]:
    """The rank in use outside training: an int where all modules were set alike, else a dict from module name to rank.

    Args:
        model: the model with DyLoRA adapters.
        adapter_name: the adapter, or None for the first active one.
    """
    name = active_adapter(model, adapter_name)
    layers: list[tuple[str, Any]] = list(ranked_layers(model, name))
    asked = {layer.lora_ranks[name].asked for _, layer in layers}
    # At full rank a capped module was asked for its cap or for r: both mean the same.
    if len(asked) == 1 or all(layer.lora_ranks[name].rank == layer.lora_ranks[name].max_rank for _, layer in layers):
        return max(asked)
    return {key: layer.lora_ranks[name].rank for key, layer in layers}


@contextmanager
def at_rank(model: nn.Module, rank: int | dict[str, int], adapter_name: str | None = None) -> Iterator[None]:
    """`set_rank` inside a `with` block; the ranks from before come back after it, also on an error."""
    names = _dynamic_adapters(model, adapter_name)
    before = [(layer, name, layer.lora_ranks[name].asked) for name in names for _, layer in ranked_layers(model, name)]
    try:
        for name in names:
            _apply_rank(model, rank, name)
        yield
    finally:
        for layer, name, asked in before:
            if layer.lora_ranks[name].asked != asked:
                set_layer_rank(layer, name, asked)
