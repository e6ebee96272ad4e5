"""What LoRETTA trains beside its adapters: layer norms, heads, and a classifier that becomes a tensor train."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import TaskType
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peft_dynamic.functional.tensor_train import check_shape, factorize
from peft_dynamic.hosts.blocks import find_classifier_dense, find_heads, find_norms, linear_features, original_modules
from peft_dynamic.hosts.quantization import quantized_layers
from peft_dynamic.tuners.tensor_train import TensorTrainLinear


def check_tt_shape(shape: Any, in_features: int, out_features: int, config: Any, name: str) -> None:
    """Raise ValueError, with the place, unless the layer can have a tensor train of this shape."""
    try:
        check_shape(shape, in_features, out_features, config.tensor_rank)
    except ValueError as error:
        raise ValueError(f"{type(config).__name__}, at {name!r}: {error}") from error


class Extras:
    """What one adapter trains beside its own layers, found and checked before anything is changed.

    Attributes:
        norms: layer norms to train.
        heads: modules to train whole, beyond `modules_to_save`.
        dense: the classifier's dense layer to replace, or None.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        classify = config.task_type == TaskType.SEQ_CLS
        self.heads = find_heads(model) if classify else []
        self.dense = find_classifier_dense(model) if classify and config.tensorize_classifier else None
        self._check_plain(model, config)
        saved = [*(config.modules_to_save or []), *self.heads]
        self.norms = [
            name
            for name in (find_norms(model) if config.train_layer_norms else [])
            if not any(f".{name}".endswith(f".{other}") or f".{other}." in f".{name}." for other in saved)
        ]
        if self.dense is not None:
            features = linear_features(dict(original_modules(model))[self.dense])
            assert features is not None
            check_tt_shape(factorize(*features), *features, config, self.dense)

    def _check_plain(self, model: nn.Module, config: Any) -> None:
        """Raise ValueError if what would be trained whole is quantised: PEFT's own error names no module."""
        saved = [f".{name}" for name in config.modules_to_save or []]
        found = [
            name
            for name, module in original_modules(model)
            if (name in self.whole or f".{name}".endswith(tuple(saved))) and quantized_layers(module)
        ]
        packed = sorted(set(found))
        if packed:
            raise ValueError(
                f"{type(config).__name__} trains {', '.join(packed)} whole, which is quantised. Load the model with "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules={packed!r})"
                + (", or set tensorize_classifier=False." if packed == [self.dense] else ".")
            )

    @property
    def whole(self) -> list[str]:
        """Modules in which no adapter goes."""
        return [*([self.dense] if self.dense else []), *self.heads]


class AlsoTrained:
    """Mixed into a tuner: trains, saves and gives back what `Extras` names."""

    peft_config: Any
    model: Any
    active_adapters: Any

    def _train_extras(self, model: nn.Module, adapter_name: str, extras: Extras) -> None:
        for name in [*extras.heads, *extras.norms]:
            self._train_whole(model, name, adapter_name)
        if extras.dense is not None:
            self._tensorize(model, extras.dense, adapter_name)

    def _train_whole(self, model: nn.Module, name: str, adapter_name: str) -> ModulesToSaveWrapper:
        """Train a copy of a module, as `modules_to_save` does, but of exactly this one: PEFT matches ends of names."""
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        wrapper = getattr(parent, child)
        active = adapter_name in self.active_adapters
        inference_mode = self.peft_config[adapter_name].inference_mode
        if isinstance(wrapper, ModulesToSaveWrapper):
            known = adapter_name in wrapper.modules_to_save
            wrapper.update(adapter_name)
            if active or not known:
                wrapper.set_adapter(adapter_name if active else wrapper.active_adapters, inference_mode=inference_mode)
        else:
            wrapper = ModulesToSaveWrapper(wrapper, adapter_name)
            wrapper.set_adapter(adapter_name if active else [], inference_mode=inference_mode)
            setattr(parent, child, wrapper)
        return wrapper

    def _tensorize(self, model: nn.Module, name: str, adapter_name: str) -> None:
        """Put a tensor train in the place of a linear layer, in the copy that belongs to this adapter."""
        config = self.peft_config[adapter_name]
        owner: nn.Module = model
        path = name.split(".")
        for depth, part in enumerate(path):
            parent, owner = owner, getattr(owner, part)
            if isinstance(owner, ModulesToSaveWrapper) and adapter_name in owner.modules_to_save:
                parent, owner = owner.modules_to_save, owner.modules_to_save[adapter_name]
                path = [adapter_name, *path[depth + 1 :]]
                break
        else:
            wrapper = self._train_whole(model, name, adapter_name)
            parent, owner, path = wrapper.modules_to_save, wrapper.modules_to_save[adapter_name], [adapter_name]
        for part in path[1:]:
            parent, owner = owner, getattr(owner, part)
        features = linear_features(owner)
        assert features is not None, name
        train = TensorTrainLinear(*features, config.tensor_rank)
        old = next(owner.parameters())
        dtype = old.dtype if old.is_floating_point() else None
        train.to(device=old.device, dtype=dtype).requires_grad_(old.requires_grad)
        if isinstance(parent, nn.ModuleDict):
            parent[path[-1]] = train
        else:
            setattr(parent, path[-1], train)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ModulesToSaveWrapper):
            setattr(parent, child_name, new_module)  # PEFT's expects a weight, which a head of several layers lacks
        else:
            super()._replace_module(parent, child_name, new_module, child)  # type: ignore[misc]  # the tuner's

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)  # type: ignore[misc]  # the tuner's
        if autocast_adapter_dtype:
            for wrapper in self._wrappers():
                if adapter_name in wrapper.modules_to_save:
                    for module in wrapper.modules_to_save[adapter_name].modules():
                        if isinstance(module, TensorTrainLinear) and module.dtype in (torch.float16, torch.bfloat16):
                            module.float()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if not merge:
            # PEFT would leave the trained copies in the model; the layer norms and the classifier belong to the adapter
            for wrapper in self._wrappers():
                wrapper.set_adapter([])
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)  # type: ignore[misc]  # the tuner's
        for name, module in list(model.named_modules()):
            if isinstance(module, TensorTrainLinear):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.as_linear())
        return model

    def _wrappers(self) -> list[ModulesToSaveWrapper]:
        return [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]
