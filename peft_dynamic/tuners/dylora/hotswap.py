"""Hot-swapping a DyLoRA adapter: new weights into the parameters that are there, so that nothing is compiled again."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftConfig, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights
from torch import nn

from peft_dynamic.tuners.dylora.layer import ranked_layers
from peft_dynamic.tuners.dylora.model import at_rank, get_rank, set_rank
from peft_dynamic.tuners.dylora.schedule import RankSchedule

# What may differ between the two adapters: what only training reads.
_MAY_DIFFER = {"rank_sampling", "geometric_p", "update", "rank_seed", "lora_dropout", "lora_alpha", "inference_mode"}
_MAY_DIFFER |= {"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "init_lora_weights", "ranks"}
_MAY_DIFFER |= {"hub_ranks"}


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace the weights of a DyLoRA adapter by those of a saved one, at whatever rank is set; the set rank stays.

    PEFT's function of this name knows stock LoRA only and refuses DyLoRA, since it compares whole matrices. This one
    takes the same arguments. Nothing is changed when the adapters do not fit, or the file is damaged.

    Args:
        model: a `PeftModel` with a DyLoRA adapter.
        model_name_or_path: folder or Hub repository of the new adapter.
        adapter_name: the adapter to overwrite.
        torch_device: where to load the weights; None for PEFT's choice.
        kwargs: passed on to `PeftConfig.from_pretrained` and the download.

    Raises:
        ValueError: the new adapter has another type, r, target, truncation or scaling, lacks tensors, has others than
            this one, or holds NaN.
    """
    configs: Any = model.peft_config
    old = configs[adapter_name]
    new = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    if type(new) is not type(old):
        raise ValueError(f"cannot swap a {type(new).__name__} adapter into {adapter_name!r}, a {type(old).__name__}.")
    ours, theirs = old.to_dict(), new.to_dict()
    differing = sorted(key for key in ours if key not in _MAY_DIFFER and ours[key] != theirs.get(key))
    if differing:
        pairs = ", ".join(f"{key}={theirs.get(key)!r} instead of {ours[key]!r}" for key in differing)
        raise ValueError(
            f"cannot swap {model_name_or_path} into {adapter_name!r}: it has {pairs}. Use load_adapter, which makes a "
            "second adapter."
        )
    weights: dict[str, torch.Tensor] = load_peft_weights(str(model_name_or_path), device=torch_device, **kwargs)
    with at_rank(model, old.r, adapter_name):
        saved = {name: value.clone() for name, value in get_peft_model_state_dict(model, None, adapter_name).items()}
        ends = tuple(f".lora_schedule.{name}" for name in RankSchedule.optional_buffers)
        if odd := sorted(name for name in saved.keys() ^ weights.keys() if not name.endswith(ends)):
            kind = "lacks" if odd[0] in saved else "has"
            raise ValueError(
                f"cannot swap {model_name_or_path} into {adapter_name!r}: it {kind} {odd[0]}, unlike the adapter that "
                f"is there ({len(odd)} such tensors). Nothing was changed. Use load_adapter for another adapter."
            )
        try:
            set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
        except Exception:
            set_peft_model_state_dict(model, saved, adapter_name=adapter_name)
            raise
    if old.lora_alpha != new.lora_alpha:
        rank = get_rank(model, adapter_name)
        for name, layer in ranked_layers(model, adapter_name):
            if get_pattern_key(list(old.alpha_pattern), name) not in old.alpha_pattern:
                layer.lora_views[adapter_name].lora_alpha = new.lora_alpha
        old.lora_alpha = new.lora_alpha
        set_rank(model, rank, adapter_name)
