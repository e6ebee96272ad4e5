"""LoRETTA_adp's tuner: checks everything, then injects the adapters, the trained layer norms and the classifier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from peft_dynamic.functional.tensor_train import factorize
from peft_dynamic.hosts.blocks import linear_features, original_modules
from peft_dynamic.hosts.quantization import unpack_bnb_4bit
from peft_dynamic.tuners.also_trained import AlsoTrained, Extras, check_tt_shape
from peft_dynamic.tuners.as_lora import check_target, refuse_experts
from peft_dynamic.tuners.checkpoint import CheckedLoading
from peft_dynamic.tuners.factors import keep_together
from peft_dynamic.tuners.loretta_adp.config import LorettaAdpConfig
from peft_dynamic.tuners.loretta_adp.layer import CANNOT_MERGE, LorettaAdpLayer
from peft_dynamic.tuners.loretta_adp.structure import find_targets

# Modules of torch that read the weights of the linear layers inside them instead of calling these.
_BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class _Plan:
    """What one adapter will change, found and checked before anything is changed.

    Attributes:
        targets: layer name -> whether its adapter works on its input.
        excluded: names that `exclude_modules` took away.
        extras: what it trains beside its adapters.
    """

    def __init__(self, model: nn.Module, config: LorettaAdpConfig) -> None:
        modules = dict(original_modules(model))
        self.extras = Extras(model, config)
        self.excluded: set[str] = set()
        self.targets = self._find_targets(model, modules, config)
        self._check_targets(modules, config)

    def _find_targets(
        self, model: nn.Module, modules: dict[str, nn.Module], config: LorettaAdpConfig
    ) -> dict[str, bool]:
        found = [] if config.target_modules is not None else find_targets(model, config.placement)
        before = {target.name: target.before for target in found if _in_chosen_block(target.name, config)}
        rule = SimpleNamespace(
            target_modules=config.target_modules if config.target_modules is not None else set(before),
            target_parameters=None,
            exclude_modules=config.exclude_modules,
            # what is trained whole has no adapter inside
            modules_to_save=[*(config.modules_to_save or []), *self.extras.whole],
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
        )
        targets = {}
        for name in modules:
            matched = check_target_module_exists(rule, name) if name else False
            if isinstance(matched, _ExcludedModule):
                self.excluded.add(name)
            elif matched:
                targets[name] = before.get(name, False)
        if not targets:
            raise NoMatchingPeftModuleError(
                f"LorettaAdpConfig: no layer of {type(model).__name__} is left to adapt with target_modules="
                f"{config.target_modules!r}, exclude_modules={config.exclude_modules!r}, layers_to_transform="
                f"{config.layers_to_transform!r} and layers_pattern={config.layers_pattern!r}. Pass names as "
                "model.named_modules() shows them, or target_modules=None to find the layers by structure."
            )
        return targets

    def _check_targets(self, modules: dict[str, nn.Module], config: LorettaAdpConfig) -> None:
        bypassing = [name for name, module in modules.items() if isinstance(module, _BYPASSING)]
        for name, before in self.targets.items():
            features = linear_features(modules[name])
            inside = next((other for other in bypassing if not other or name.startswith(f"{other}.")), None)
            if inside is not None:
                raise ValueError(
                    f"LorettaAdpConfig: {name!r} lies inside {inside!r}, a {type(modules[inside]).__name__} of torch, "
                    "which reads the weights of its layers and does not call them, so that an adapter would do "
                    "nothing. Exclude it with exclude_modules, or replace it by separate linear layers."
                )
            if features is None:
                raise ValueError(
                    f"LorettaAdpConfig: {name!r} is a {type(modules[name]).__name__}, and adapters go after linear "
                    "layers only (nn.Linear, transformers' Conv1D, or a quantised linear layer). Change "
                    "target_modules, or pass None to find the layers by structure."
                )
            hidden = features[0] if before else features[1]
            if config.bottleneck > hidden:
                raise ValueError(
                    f"LorettaAdpConfig: bottleneck={config.bottleneck} is above {hidden}, the width at {name!r}: it "
                    f"would be no bottleneck. Pass at most {hidden}, for example {max(1, hidden // 8)}."
                )
            shape = config.tensor_shape or factorize(hidden, config.bottleneck)
            check_tt_shape(shape, hidden, config.bottleneck, config, name)


def _in_chosen_block(name: str, config: LorettaAdpConfig) -> bool:
    """What `layers_to_transform` says of a layer; PEFT's own rule, which skips names that are given in full."""
    rule = SimpleNamespace(
        target_modules={name},
        target_parameters=None,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return bool(check_target_module_exists(rule, f"model.{name}"))


class LorettaAdpModel(AlsoTrained, CheckedLoading, BaseTuner):
    """A model with LoRETTA_adp adapters, made by `get_peft_model(model, LorettaAdpConfig(...))`.

    Bad settings are refused before the model is changed. Not mergeable: merging raises, `unload()` gives the base model
    back, its own layer norms and classifier included.

    Source: Yang et al., NAACL 2024, arXiv 2402.11417.
    """

    prefix: str = "loretta_"
    tuner_layer_cls = LorettaAdpLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's attribute, never read here

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        config = self.peft_config[adapter_name]
        if config.target_modules == DUMMY_TARGET_MODULES:
            return super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        refuse_experts(config, model, "LorettaAdpConfig")
        _maybe_include_all_linear_layers(config, model)
        self._plan = plan = _Plan(model, config)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            del self._plan
        self._train_extras(model, adapter_name, plan.extras)
        keep_together(model, LorettaAdpLayer)
        unpack_bnb_4bit(model)
        return None

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config  # target_modules=None stays: an adapter is saved with the rule, not with its result

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        if key in self._plan.excluded:
            return _ExcludedModule()
        return key in self._plan.targets

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        check_target(peft_config, model, target_name)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        before = self._plan.targets.get(current_key, False)
        if isinstance(target, LorettaAdpLayer):
            target.update_layer(adapter_name, peft_config, before)
            return
        layer = LorettaAdpLayer(target, adapter_name, peft_config, before)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)

    def delete_adapter(self, adapter_name: str) -> None:
        active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        # PEFT asks the first layer which adapter comes next, and that layer may not have the remaining ones: the
        # placement of each adapter is its own.
        if active and not self.active_adapters and self.peft_config:
            self.set_adapter(min(self.peft_config))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops this argument where a tuner does not look at it, and would use the active adapter for every row.
        if kwargs.get("adapter_names") is not None:
            raise TypeError(
                f"{type(self).__name__} does not support mixed adapter batches. Drop adapter_names and run the rows of "
                "each adapter after set_adapter."
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            raise NotImplementedError(CANNOT_MERGE)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)
