"""What PEFT does for `peft_type == LORA` alone, done for our methods too; PEFT knows their types by name only.

Each function here stands for one special case in PEFT's source. tests/tuners/test_as_lora.py searches that source for
such cases and is red by name when a release adds one.
"""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import torch
from peft.utils.peft_types import PeftType
from torch import nn

from peft_dynamic.tuners.factors import viewed_layers

# Parts of the names of what our methods store beside the two factors, and what they show does without.
NOT_LORA = (".lora_mixer.", ".lora_schedule.", ".lora_scales.")


def as_lora(config: Any) -> Any:
    """The configuration as a stock LoRA's, for a function of PEFT that asks for the type. A shallow copy."""
    stand_in = copy(config)
    stand_in.peft_type = PeftType.LORA
    return stand_in


def _converted(config: Any, model: nn.Module) -> Any:
    """A copy of the configuration with expert layers as `target_parameters`, as stock LoRA's conversion leaves it."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    stand_in = as_lora(config)
    for name in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        setattr(stand_in, name, deepcopy(getattr(config, name, None)))
    for name in ("r", "lora_alpha"):  # of no meaning to LoRETTA_adp; read for rank_pattern
        setattr(stand_in, name, getattr(config, name, 1))
    convert_peft_config_for_transformers(stand_in, model=model, conversions=None)
    return stand_in


def target_experts(config: Any, model: nn.Module) -> None:
    """Let `target_modules` name the experts of a mixture, as under stock LoRA.

    transformers 5 keeps the experts of Mixtral, Qwen-MoE and their like in 3-D parameters. PEFT turns "gate_proj",
    "w1", "all-linear" and so on into `target_parameters` for them, for type LORA only; elsewhere these names would
    match nothing, and nobody would be told. Fused projections get a rank of their own in `rank_pattern`.

    Raises:
        ValueError: only a part of a fused projection is named.
    """
    if config.target_modules is None or not hasattr(getattr(model, "config", None), "model_type"):
        return
    converted = _converted(config, model)
    for name in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        setattr(config, name, getattr(converted, name))


def refuse_experts(config: Any, model: nn.Module, method: str) -> None:
    """Raise ValueError where `target_modules` names experts that are 3-D parameters, for a method of linear layers."""
    if config.target_modules is None or not hasattr(getattr(model, "config", None), "model_type"):
        return
    before = set(getattr(config, "target_parameters", None) or ())
    converted = _converted(config, model)
    experts = sorted(set(converted.target_parameters or ()) - before)
    if experts:
        linear = sorted(name for name in converted.target_modules if isinstance(name, str))
        raise ValueError(
            f"{method}: target_modules={config.target_modules!r} names the experts of {type(model).__name__}, which "
            f"are 3-D parameters ({', '.join(experts)}) and no linear layers. List linear layers only"
            + (f", for example target_modules={linear}" if linear else "")
            + ", or take LoRA, DyLoRA or MoSLoRA, which adapt experts."
        )


def check_target(config: Any, model: nn.Module, target_name: str) -> None:
    """PEFT's refusal of layers that Mamba's kernels read without calling, so that an adapter would do nothing.

    Raises:
        ValueError: `target_name` is such a layer of such a model.
    """
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(as_lora(config), model, target_name)
    except ValueError as error:
        raise ValueError(str(error).replace(str(PeftType.LORA), str(config.peft_type))) from None


def warn_of_parts(state_dict: dict[str, Any], adapter_name: str) -> None:
    """PEFT's warning of factors that a sharded model has not gathered, for those that are stored as matrices."""
    from peft.utils.save_and_load import _validate_lora_adapter_state_dict

    vectors = (".cores", ".start", ".bias")  # tensor trains, and `lora_bias`, of which PEFT warns without a reason
    matrices = {
        key: value for key, value in state_dict.items() if not key.endswith(vectors) and ".lora_schedule." not in key
    }
    _validate_lora_adapter_state_dict(matrices, adapter_name=adapter_name)


def is_of_diffusers(model: nn.Module) -> bool:
    """Whether the model is one of diffusers', whose scripts save adapters by PEFT's state dict and nothing else."""
    return any(cls.__module__.partition(".")[0] == "diffusers" for cls in type(model).__mro__)


def as_stock(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's state dict as that of a stock LoRA at the set rank, with the scale in B.

    diffusers keeps `lora_A` and `lora_B`, drops all else with a line in its log, takes the rank from their shapes and
    `lora_alpha` as equal to it. So that is what it gets.
    """
    made = {
        key: value
        for key, value in state_dict.items()
        if not any(part in key for part in NOT_LORA) and not key.endswith((".cores", ".start"))
    }
    layer: Any
    for prefix, layer in viewed_layers(model, adapter_name):
        of_embedding = adapter_name not in layer.lora_A
        for side, (holder, name, view) in zip("AB", layer.lora_views[adapter_name].parts, strict=True):
            key = f"{prefix}.lora_{side}.{adapter_name}.weight"
            if of_embedding:
                key = f"{prefix}.lora_embedding_{side}.{adapter_name}"
            shown = view.anew(holder._parameters[name]).detach()
            scaled = shown * layer.scaling[adapter_name] if side == "B" else shown
            made[key] = scaled.clone(memory_format=torch.contiguous_format)  # safetensors takes no other
    return made
