"""LoRETTA_rep's factors, which a file has as the cores of tensor trains, as matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from typing import Any

import torch

from peft_dynamic.export import PEFT_PREFIX
from peft_dynamic.functional.tensor_train import contract, core_shapes, parameter_count

_CORES = {".lora_A.cores": 0, ".lora_B.cores": 1}


def matrices_of_cores(
    tensors: dict[str, torch.Tensor], config: Any, name: str, rank_of: Callable[[str], int]
) -> tuple[dict[str, torch.Tensor], Any]:
    """The checkpoint with A and B in the place of the cores, and its configuration as that of a LoRA.

    With `tensor_shape` all targets have product / bottleneck inputs and outputs. Without it the shape follows from the
    layer's sizes, and many sizes have equally many numbers: at bottleneck 8 and tensor rank 5, those of 768 inputs are
    those of 42 sizes from 64 to 16384.

    Args:
        tensors: of the file.
        config: its `LorettaRepConfig`.
        name: what messages call it.
        rank_of: module, without PEFT's prefix -> its bottleneck.

    Raises:
        ValueError: the file does not tell the shapes, or which modules were trained whole, or is damaged.
    """
    shape = config.tensor_shape
    if shape is None:
        raise ValueError(
            f"{name} has tensor_shape=None: the shapes of its tensor trains follow from the sizes of the base model's "
            "layers, which the file does not tell. Load it on its base model, write it with export_lora, and pass that "
            "folder."
        )
    count = parameter_count(shape, config.tensor_rank)
    found, noisy = {}, False
    for key, tensor in tensors.items():
        end = next((end for end in _CORES if key.endswith(end)), None)
        if end is None:
            if not key.endswith((".lora_A.start", ".lora_B.start")):
                found[key] = tensor
            continue
        dim, module = _CORES[end], key.removesuffix(end)
        start = tensors.get(f"{key.removesuffix('cores')}start")
        rank = rank_of(module.removeprefix(PEFT_PREFIX))
        for part in (tensor, *([] if start is None else [start])):
            if part.shape != (count,) or math.prod(shape) % rank:
                raise ValueError(
                    f"{name}: {key} has {part.numel()} numbers, and {count} by tensor_shape={shape} and "
                    f"tensor_rank={config.tensor_rank}. The file is damaged: take another copy."
                )
        weight = _matrix(tensor, config, dim, rank)
        if start is not None:  # B A x - B0 A0 x is a LoRA with the factors [A; A0] and [B, -B0]
            first, noisy = _matrix(start, config, dim, rank), True
            weight = torch.cat([weight, -first if dim else first], dim)
        found[f"{key.removesuffix('cores')}weight"] = weight.to(tensor.dtype)
    return found, _as_lora(found, config, name, noisy)


def _matrix(cores: torch.Tensor, config: Any, dim: int, rank: int) -> torch.Tensor:
    shapes = core_shapes(config.tensor_shape, config.tensor_rank)
    features = math.prod(config.tensor_shape) // rank
    parts = zip(cores.double().split([math.prod(shape) for shape in shapes]), shapes, strict=True)
    sides = (rank, features) if dim else (features, rank)
    return contract([part.view(shape) for part, shape in parts], *sides).mT


def _as_lora(tensors: dict[str, torch.Tensor], config: Any, name: str, noisy: bool) -> Any:
    """Layer norms become `modules_to_save`; with the start subtracted the ranks are twice as large, at one scale."""
    made = copy(config)
    listed = [*(config.modules_to_save or [])]
    whole = {key.removeprefix(PEFT_PREFIX).rpartition(".")[0] for key in tensors if ".lora_" not in key}
    beside = sorted(key for key in whole if not any(f".{key}.".find(f".{end}.") >= 0 for end in listed))
    plain = config.bias == "none" and config.task_type != "SEQ_CLS" and not config.trainable_token_indices
    if (beside and not plain) or any(key.endswith(".cores") for key in tensors):
        odd = next(iter([*beside, *whole]))
        raise ValueError(
            f"{name} has trained tensors such as {odd!r} beside its factors, and the file does not tell the "
            "modules that they belong to. Load it on its base model, write it with export_lora, and pass that folder."
        )
    made.modules_to_save = [*listed, *beside] or None
    if noisy:
        factor = math.sqrt(2) if config.use_rslora else 2
        made.r, made.lora_alpha = 2 * config.r, factor * config.lora_alpha
        made.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
        made.alpha_pattern = {key: factor * alpha for key, alpha in (config.alpha_pattern or {}).items()}
    return made
