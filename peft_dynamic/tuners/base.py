"""What our LoRA-like tuners share: PEFT's `LoraModel`, whose layers' factors become views of what they store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peft_dynamic.hosts.quantization import unpack_bnb_4bit
from peft_dynamic.tuners import optimizers as optimizers  # for its hook
from peft_dynamic.tuners.as_lora import as_stock, check_target, is_of_diffusers, target_experts, warn_of_parts
from peft_dynamic.tuners.checkpoint import CheckedLoading
from peft_dynamic.tuners.factors import is_viewed, keep_together
from peft_dynamic.tuners.lora_fields import check_variant
from peft_dynamic.tuners.steps import PassHooks


class ComputedLoraModel(CheckedLoading, LoraModel):
    """PEFT's `LoraModel`, with a method's view put into every LoRA layer that it makes.

    Attributes:
        method: the name in messages.
    """

    method: str

    def _make_computed(self, layer: LoraLayer, adapter_name: str, config: Any) -> None:
        """Put the method's views into the adapter's factors in one layer."""
        raise NotImplementedError

    def _forget(self, adapter_name: str) -> None:
        """Drop what the tuner holds of an adapter that goes."""
        for handle in self.__dict__.get("_hooks_of_adapters", {}).pop(adapter_name, []):
            handle.remove()
        self.__dict__.get("_schedules", {}).pop(adapter_name, None)
        self.__dict__.get("_schedule_holders", set()).discard(adapter_name)

    def _new_schedule(self, config: Any) -> Any:
        """What changes with the optimizer steps; asked of the methods that have such, each of which makes its own."""
        raise NotImplementedError

    def _schedule(self, adapter_name: str) -> Any:
        schedules: dict[str, Any] = self.__dict__.setdefault("_schedules", {})
        if adapter_name not in schedules:
            schedules[adapter_name] = self._new_schedule(self.peft_config[adapter_name])
        return schedules[adapter_name]

    def _register_hooks(self, model: nn.Module, adapter_name: str, kind: type[PassHooks]) -> None:
        """Let the adapter's schedule know of the model's forward passes."""
        hooks = self.__dict__.setdefault("_hooks_of_adapters", {})
        hooks[adapter_name] = kind(self._schedule(adapter_name)).register(model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for adapter_name in list(self.__dict__.get("_hooks_of_adapters", {})):
            self._forget(adapter_name)
        return model

    def _keep_in_state_dict(self, schedule: nn.Module, layer: LoraLayer, adapter_name: str) -> None:
        # One layer carries the step number, as one of its adapter modules: PEFT saves, loads, moves and deletes it.
        if adapter_name in self.__dict__.setdefault("_schedule_holders", set()):
            return
        self._schedule_holders.add(adapter_name)
        if not hasattr(layer, "lora_schedule"):
            layer.lora_schedule = nn.ModuleDict()
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_schedule")
        layer.lora_schedule[adapter_name] = schedule

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, and all or nothing: when a layer is refused, the model is left as it was."""
        self._target_experts(model, self.peft_config[adapter_name])
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self._roll_back(model, adapter_name)
            raise
        keep_together(model, LoraLayer)
        unpack_bnb_4bit(model)

    def _target_experts(self, model: nn.Module, config: Any) -> None:
        """Take in, or refuse, the experts that `target_modules` names."""
        target_experts(config, model)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        check_target(peft_config, model, target_name)

    def _create_and_replace(
        self,
        lora_config: Any,
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
        made = 0
        # Two roots: a further adapter goes into `target`, which may lie inside nested ParamWrappers. And all modules
        # below, since MultiheadAttention holds a LoRA layer for its out_proj. In this order the first layer, which
        # carries DyLoRA's step number, is the same one for each adapter, so that checkpoints fit.
        for module in (*getattr(parent, target_name).modules(), *target.modules()):
            if not isinstance(module, LoraLayer) or is_viewed(module, adapter_name):
                continue
            if adapter_name in module.lora_A or adapter_name in module.lora_embedding_A:
                check_variant(lora_config, module.lora_variant.get(adapter_name), current_key)
                self._make_computed(module, adapter_name, lora_config)
                module.lora_views[adapter_name].name = current_key
                made += 1
        if not made:
            raise ValueError(
                f"{self.method} cannot adapt {type(getattr(parent, target_name)).__name__} at {current_key!r}: it has "
                "no lora_A and lora_B. Leave the module out of target_modules."
            )

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

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any) -> Any:
        state_dict = super()._get_adapter_state_dict(model=model, config=config, adapter_name=adapter_name, **kwargs)
        warn_of_parts(state_dict, adapter_name)
        return as_stock(model, adapter_name, state_dict) if is_of_diffusers(model) else state_dict

    @classmethod
    def _convert_state_dict_for_initial_model(cls, model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "path_initial_model_for_weight_conversion: it takes a changed start (PiSSA, OLoRA and their like) out of "
            f"an adapter, and {cls.method} has no such start. Leave it out; export_lora writes a stock LoRA."
        )

    def _weighted(self, config: Any, adapter_name: str) -> Any:
        """The configuration that an adapter combined from this one and others has: it stores what it shows."""
        return replace(config, mixer_init="identity", train_mixer=False)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's, over what the adapters show. The new adapter has one rank, a constant scale of 1 and no mixer."""
        configs = {name: self.peft_config[name] for name in adapters if name in self.peft_config}
        try:
            for name, config in configs.items():
                # PEFT sizes the new adapter by r, and needs lora_alpha = r to be a scale of 1
                self.peft_config[name] = self._weighted(config, name)
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self.peft_config.update(configs)


ViewedLoraModel = ComputedLoraModel  # its name of before
