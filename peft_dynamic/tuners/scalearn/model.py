"""ScaLearn's tuner: PEFT's `LoraModel`, whose factors are those of the sources and whose B is scaled by omega."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peft_dynamic.functional.scales import start_of_scales
from peft_dynamic.hosts.saving import stored_name
from peft_dynamic.tuners.as_lora import is_of_diffusers
from peft_dynamic.tuners.base import ComputedLoraModel
from peft_dynamic.tuners.checkpoint import PREFIX
from peft_dynamic.tuners.computed import ComputedFactor, install, layout
from peft_dynamic.tuners.factors import attach, viewed_layers
from peft_dynamic.tuners.moments import AdapterMoments
from peft_dynamic.tuners.scalearn.layer import ScaledFactor, Scales, SourceState


class ScaLearnModel(ComputedLoraModel):
    """A model with ScaLearn adapters, made by `get_peft_model(model, ScaLearnConfig(...))` or by `learn_scales`.

    The weight of each layer's `lora_B` is B' of equation (2) in `functional.scales`, so that the layer is a stock LoRA
    layer of rank sum_t r_t for everything else.

    Source: Frohmann et al., Findings of ACL 2024, arXiv 2310.01217.
    """

    method = "ScaLearn"

    def merge(
        self,
        out: str | os.PathLike[str],
        rank: int | Mapping[str, int] | None = None,
        *,
        moments: AdapterMoments | None = None,
        damping: float = 0.1,
        cut: str = "auto",
        engine: str = "peft",
        adapter_name: str | None = None,
    ) -> Path:
        """Write the scaled sum as one stock LoRA adapter: `model.merge("out", rank=8)` of a `PeftModel`.

        Without a rank it is exact, of rank sum_t r_t, as `export_lora` writes it: the logits are those of this model to
        the bit where PEFT computes with the factors as they are. With a rank the sum is cut as by `resize_adapter`.

        Args:
            out: the folder to write.
            rank: of each module, or a dict as in `resize_adapter`; None for all there is.
            moments: what `adapter_moments` measured of this model; the cut then keeps what matters most on these data.
            damping: how much of the plain cut is in a calibrated one.
            cut: "inputs", "loss", "plain" or "auto", as in `resize_adapter`.
            engine: who reads the file, as in `export_lora`.
            adapter_name: the ScaLearn adapter; None for the first active one.

        Returns:
            `out`.

        Raises:
            ValueError: as `export_lora` and `resize_adapter`.
        """
        merged: Path = importlib.import_module("peft_dynamic.algebra.scales").merge_scales(
            self.model, out, rank, moments=moments, damping=damping, cut=cut, engine=engine, adapter_name=adapter_name
        )
        return merged

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        there = (*model.named_modules(), *model.named_parameters())
        lacking = config.sources.keys() - {name.replace(".base_layer", "") for name, _ in there}
        if lacking:
            raise ValueError(
                f"ScaLearn: the sources adapt {min(lacking)} ({len(lacking)} such), which {type(model).__name__} does "
                "not have. Pass the base model that they were trained on."
            )
        self.__dict__["_found"] = {}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        del self.__dict__["_found"]
        try:
            _fill(model, adapter_name, config.factors)
        except Exception:
            self._roll_back(model, adapter_name)
            raise

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
        self.__dict__["_key"] = current_key
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )

    def _make_computed(self, layer: LoraLayer, adapter_name: str, config: Any) -> None:
        key = self.__dict__["_key"]
        ranks = config.sources.get(key)
        groups_a, groups_b, divisor = layout(layer)
        if ranks is None or sum(ranks.values()) * divisor != layer.r[adapter_name]:
            raise ValueError(
                f"ScaLearn: the sources have no factors for {key}, which PEFT takes for one of their modules. "
                "Pass the base model that they were trained on."
            )
        names = [*(config.adapters if config.shared else ranks)]
        scales = self._scales_of(layer, adapter_name, config, len(names))
        rows = {names.index(name): rank for name, rank in ranks.items()}
        rank = layer.r[adapter_name]
        factor_a = ComputedFactor(0, rank, groups_a, divisor)
        factor_b = ScaledFactor(rank, groups_b, divisor, scales, rows, config.omega_dropout)
        parts = install(layer, adapter_name, self.method, factor_a, factor_b)
        attach(layer, adapter_name, SourceState(parts, scales, unread=not config.factors))
        self.__dict__["_found"][key] = scales

    def _scales_of(self, layer: Any, adapter_name: str, config: Any, sources: int) -> Scales:
        """Omega of the layer; with `shared` that of the first layer, which is saved with that one alone."""
        found = self.__dict__["_found"]
        if config.shared and found:
            shared: Scales = next(iter(found.values()))
            return shared
        b = layer.lora_B[adapter_name].weight if adapter_name in layer.lora_B else layer.lora_embedding_B[adapter_name]
        width = len(b) if config.shape == "vector" else 1
        if b.device.type == "meta":  # there with low_cpu_mem_usage, until a checkpoint is loaded
            weight = torch.empty(sources, width, device="meta")
        else:
            weight = start_of_scales(sources, width, config.omega_init / len(config.adapters)).to(b.device)
        scales = Scales(weight)
        if not hasattr(layer, "lora_scales"):
            layer.lora_scales = nn.ModuleDict()
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_scales")
        layer.lora_scales[adapter_name] = scales
        return scales

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for _, layer in viewed_layers(self.model, adapter_name):
            state = layer.lora_views[adapter_name]
            for tensor in (*state.factors(), state.scales.weight):
                tensor.data = tensor.data.to(state.dtype)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any) -> Any:
        """PEFT's, with the sources: Trainer leaves frozen parameters out of what it gathers from ZeRO-3."""
        found = super()._get_adapter_state_dict(model=model, config=config, adapter_name=adapter_name, **kwargs)
        if is_of_diffusers(model):
            return found
        for name, layer in viewed_layers(model, adapter_name):
            name = stored_name(name)
            for end in _ends(layer, adapter_name):
                stem, dot, weight = end.partition(".")
                key, place = f"{name}.{stem}.{adapter_name}{dot}{weight}", _in_file(name, end)
                if key in found:
                    continue
                if place not in config.factors:
                    raise RuntimeError(
                        f"the adapter {adapter_name!r} cannot be saved: {key} is not at hand. Gather the model's "
                        "parameters first, the frozen ones too."
                    )
                found[key] = config.factors[place]
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if not config.inference_mode:  # to be saved again
            config.keep_factors({key: value for key, value in state_dict.items() if key.endswith(FACTORS)})
        return remapped

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "ScaLearn adapters cannot be combined: each has sources of its own. Write each with export_lora, load "
            "them with PEFT, and combine those LoRA adapters; or make a ScaLearnConfig of them."
        )


FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def _ends(layer: Any, adapter_name: str) -> tuple[str, ...]:
    """How the names of the adapter's two factors in a layer end in a file."""
    return FACTORS[:2] if adapter_name in layer.lora_A else FACTORS[2:]


def _in_file(layer: str, end: str) -> str:
    """The name of a factor in a file."""
    return f"{PREFIX}{layer.removeprefix(PREFIX)}.{end}"


def _fill(model: nn.Module, adapter_name: str, factors: Mapping[str, torch.Tensor]) -> None:
    """Put the sources' factors into the layers, in their own dtype: that of the base model may be a narrow one."""
    if not factors:
        return
    for name, layer in viewed_layers(model, adapter_name):
        stored = layer.lora_views[adapter_name].factors()
        for parameter, end in zip(stored, _ends(layer, adapter_name), strict=True):
            factor = factors[_in_file(name, end)]
            if factor.shape != parameter.shape:
                raise ValueError(
                    f"ScaLearn: the sources have a factor of shape {tuple(factor.shape)} at {name}, and the model "
                    f"needs {tuple(parameter.shape)}. Pass the base model that they were trained on."
                )
            parameter.data = factor.to(parameter.device, copy=True)
