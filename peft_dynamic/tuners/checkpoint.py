"""Whether a saved adapter fits the one that it is loaded into: asked of all of it, before any of it is loaded."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

PREFIX = "base_model.model."


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what the layers of an adapter store. Asked of the layers: any name may be part of a path."""
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for attribute in layer.adapter_layer_names:
            held = getattr(layer, attribute, {})
            if adapter_name not in held:
                continue
            place = f"{name}.{attribute}.{adapter_name}".lstrip(".")
            if isinstance(held, nn.ParameterDict):
                whole = held._parameters.get(adapter_name)
                if whole is None:  # a buffer of PEFT's
                    whole = held[adapter_name]
                found[place] = tuple(whole.shape)
            elif isinstance(held[adapter_name], nn.Module):
                tensors = (*held[adapter_name].named_parameters(), *held[adapter_name].named_buffers())
                found |= {f"{place}.{key}": tuple(tensor.shape) for key, tensor in tensors}
    return found


def check_fits(model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Refuse a checkpoint that is incomplete, misshapen, holds NaN, or would change what is none of the adapter's.

    Args:
        model: with the adapter, untouched so far.
        config: the adapter's; with its `bias` the model's own biases belong to it.
        adapter_name: the adapter.
        state_dict: the checkpoint, with the names that it has in the model.

    Raises:
        ValueError: it does not fit. Nothing was loaded.
    """
    expected = adapter_tensors(model, adapter_name)
    # on a model with injected adapters the checkpoint has a prefix that the model lacks
    found = {name.removeprefix(PREFIX): value for name, value in state_dict.items()}
    sharded = any(hasattr(parameter, "placements") for parameter in model.parameters())
    missing = [name for name in expected if name.removeprefix(PREFIX) not in found]
    if missing and not sharded:
        raise ValueError(
            f"the checkpoint for the adapter {adapter_name!r} lacks {len(missing)} of its {len(expected)} tensors, "
            f"{missing[0]} among them. It is incomplete, or was made with other target_modules. Nothing was loaded."
        )
    for name, shape in expected.items():
        value = found.get(name.removeprefix(PREFIX))
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"the checkpoint for the adapter {adapter_name!r} has {name} of shape {tuple(value.shape)}, the "
                f"model needs {shape}: it was made with another r or for another base model. Nothing was loaded."
            )
    for name, value in found.items():
        if value.is_floating_point() and not sharded and value.device.type != "meta" and not value.isfinite().all():
            raise ValueError(
                f"the checkpoint for the adapter {adapter_name!r} has NaN or infinite values in {name}: the run that "
                "made it had diverged, or the file is damaged. Load an earlier checkpoint. Nothing was loaded."
            )
    biases = getattr(config, "bias", "none") != "none"
    names = [name for name in found if not (biases and name.endswith(".bias"))]
    strange = _strange(model, adapter_name, expected, names)
    if strange:
        raise ValueError(
            f"the checkpoint for the adapter {adapter_name!r} has {strange[0]}, which is none of the adapter's tensors "
            f"but a weight of the model ({len(strange)} such). Loading it would change the base model for every "
            "adapter. Delete it from the file, or list the module in modules_to_save. Nothing was loaded."
        )


def _strange(model: nn.Module, adapter_name: str, expected: dict[str, Any], names: list[str]) -> list[str]:
    """Those that are weights of the model, but for embeddings, which PEFT saves along when they were resized."""
    own = {name.removeprefix(PREFIX) for name in expected}
    weights = {
        name.removeprefix(PREFIX)
        for name, _ in (*model.named_parameters(), *model.named_buffers())
        if f".{adapter_name}." not in name and not name.endswith(f".{adapter_name}")
    }
    embeddings: set[str] = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(model, get, lambda: None)()
        embeddings |= {
            f"{name}.".removeprefix(PREFIX) for name, module in model.named_modules() if module is layer is not None
        }
    return [
        name
        for name in names
        if name not in own and name in weights and not any(name.startswith(prefix) for prefix in embeddings)
    ]
