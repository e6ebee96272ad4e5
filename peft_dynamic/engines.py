"""What engines other than PEFT read of a LoRA checkpoint: the file is brought into that form, or refused.

Notable: llama.cpp's converter and vLLM read `r` and `lora_alpha` once for all modules and know neither `rank_pattern`
nor `alpha_pattern`; they read the two matrices of linear layers, and drop or refuse all else.
"""

from __future__ import annotations

import math
from collections import Counter
from copy import copy
from typing import Any

import torch

from peft_dynamic.methods import LORA_ENGINES

ENGINES = LORA_ENGINES
_FACTORS = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING_FACTORS = (".lora_embedding_A", ".lora_embedding_B")


def check_engine(engine: str) -> None:
    """Raise ValueError for an engine that is not known."""
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: must be one of {', '.join(ENGINES)}, the programs whose rules are known.")


def fit(
    tensors: dict[str, torch.Tensor], config: Any, engine: str, uniform_rank: bool | None, ranks: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], Any]:
    """The checkpoint in the form that an engine reads.

    Args:
        tensors: of a stock LoRA checkpoint, with PEFT's names.
        config: its `LoraConfig`.
        engine: one of `ENGINES`.
        uniform_rank: whether all modules get one rank; None for whether the engine needs it.
        ranks: module, as in the names of `tensors` -> (rank, alpha).

    Returns:
        Tensors and configuration.

    Raises:
        ValueError: the engine would drop, or misread, a part of the adapter.
    """
    if engine != "peft":
        _check_readable(tensors, config, engine)
    if uniform_rank or (uniform_rank is None and engine != "peft"):
        return _uniform(tensors, config, ranks)
    return tensors, config


def _check_readable(tensors: dict[str, torch.Tensor], config: Any, engine: str) -> None:
    refused = {
        "use_dora": "merge the adapter into the base model with merge_and_unload",
        "bias": "train with bias='none', or merge",
        "lora_bias": "train with lora_bias=False, or merge",
        "target_parameters": "merge the adapter, which adapts experts as 3-D parameters",
        "trainable_token_indices": "merge the adapter",
        "layer_replication": "merge the adapter, and convert the model that comes out",
    }
    for name, fix in refused.items():
        if getattr(config, name) not in (None, False, "none", [], {}):
            raise ValueError(
                f"engine={engine!r}: {engine} does not read {name}={getattr(config, name)!r}, so it would compute "
                f"another model. Instead {fix}."
            )
    strange = [name for name in tensors if not name.endswith(_FACTORS)]
    if strange:
        norms = any("norm" in name for name in strange)
        fix = (
            "train with train_layer_norms=False"
            if norms
            else "leave the module out of target_modules or modules_to_save"
        )
        raise ValueError(
            f"engine={engine!r}: {engine} reads lora_A and lora_B of linear layers alone, and this adapter has "
            f"{len(strange)} other tensors, {strange[0]} among them, which it would drop. Instead {fix}, or merge the "
            "adapter into the base model with merge_and_unload."
        )
    odd = [name for name, tensor in tensors.items() if tensor.dim() != 2]
    if odd:
        raise ValueError(
            f"engine={engine!r}: {engine} reads matrices alone, and {odd[0]} has {tensors[odd[0]].dim()} dimensions. "
            "Merge the adapter into the base model with merge_and_unload."
        )


def _uniform(
    tensors: dict[str, torch.Tensor], config: Any, ranks: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], Any]:
    """All modules padded with zeros to the largest rank, with one scale; what differs of a scale goes into B."""
    if config.target_parameters or config.use_dora:
        name = "target_parameters" if config.target_parameters else "use_dora"
        raise ValueError(
            f"uniform_rank=True: {name}={getattr(config, name)!r} cannot be padded to one rank. Leave uniform_rank out."
        )
    scales = {
        module: alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        for module, (rank, alpha) in ranks.items()
    }
    most = max(rank for rank, _ in ranks.values())
    common = Counter(scales.values()).most_common(1)[0][0]
    made = dict(tensors)
    for module, scale in scales.items():
        for ends in (_FACTORS, _EMBEDDING_FACTORS):
            key_a, key_b = (f"{module}{end}" for end in ends)
            if key_a in tensors:
                if tensors[key_b].shape[1] != ranks[module][0]:
                    raise ValueError(
                        f"uniform_rank=True: {module} is a grouped convolution, whose groups share the rank, so it "
                        "cannot be padded to another. Leave uniform_rank out."
                    )
                made[key_a] = _padded(tensors[key_a], 0, most)
                b = tensors[key_b] if scale == common else tensors[key_b] * (scale / common)
                made[key_b] = _padded(b, 1, most)
    config = copy(config)
    alpha = common * most
    config.r, config.lora_alpha = most, int(alpha) if float(alpha).is_integer() else alpha
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    return made, config


def _padded(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim).contiguous()
