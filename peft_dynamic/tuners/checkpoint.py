"""Whether a saved adapter fits the one that it is loaded into: asked of all of it, before any of it is loaded."""

from __future__ import annotations

import warnings
from functools import wraps
from typing import Any

import peft
import torch
from peft import peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_dynamic.hosts.registry import is_ours

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
                optional = getattr(held[adapter_name], "optional_buffers", ())
                found |= {f"{place}.{key}": tuple(tensor.shape) for key, tensor in tensors if key not in optional}
    return found


def _trained_whole(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """The same of modules and tokens that are trained beside the layers."""
    found: dict[str, tuple[int, ...]] = {}
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            places = set(wrapper.adapter_state_dict_load_map(adapter_name).values())
            tensors = (*wrapper.named_parameters(), *wrapper.named_buffers())
            found |= {f"{name}.{key}": tuple(tensor.shape) for key, tensor in tensors if key in places}
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
    expected = adapter_tensors(model, adapter_name) | _trained_whole(model, adapter_name)
    # on a model with injected adapters the checkpoint has a prefix that the model lacks
    found = {name.removeprefix(PREFIX): value for name, value in state_dict.items()}
    sharded = any(hasattr(parameter, "placements") for parameter in model.parameters())
    missing = [name for name in expected if name.removeprefix(PREFIX) not in found]
    if missing and not sharded:
        raise ValueError(
            f"the checkpoint for the adapter {adapter_name!r} lacks {len(missing)} of its {len(expected)} tensors, "
            f"{missing[0]} among them. It is incomplete, or was made with other target_modules. Nothing was loaded."
        )
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, shape in expected.items():
        value = found.get(name.removeprefix(PREFIX))
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"the checkpoint for the adapter {adapter_name!r} has {name} of shape {tuple(value.shape)}, the "
                f"model needs {shape}: it was made with another r or for another base model. Nothing was loaded."
            )
        numbers = held.get(name)
        if value is not None and numbers is not None and value.is_floating_point() != numbers.is_floating_point():
            raise ValueError(
                f"the checkpoint for the adapter {adapter_name!r} has {name} of {value.dtype}, the model needs "
                f"{numbers.dtype}: the file is damaged, or was packed by another tool. Nothing was loaded."
            )
    for name, value in found.items():
        if value.is_floating_point() and not sharded and value.device.type != "meta" and not value.isfinite().all():
            raise ValueError(
                f"the checkpoint for the adapter {adapter_name!r} has NaN or infinite values in {name}: the run that "
                "made it had diverged, or the file is damaged. Load an earlier checkpoint. Nothing was loaded."
            )
    # Biases that were trained are saved beside the adapter, and PEFT loads them whatever the configuration says.
    strange = _strange(model, expected, [name for name in found if not name.endswith(".bias")])
    if strange:
        raise ValueError(
            f"the checkpoint for the adapter {adapter_name!r} has {strange[0]}, which is none of the adapter's tensors "
            f"but a weight of the model ({len(strange)} such). Loading it would change the base model for every "
            "adapter. Delete it from the file, or list the module in modules_to_save. Nothing was loaded."
        )
    biases = _strange(model, expected, [name for name in found if name.endswith(".bias")])
    if biases and getattr(config, "bias", "none") == "none":
        warnings.warn(
            f"the checkpoint for the adapter {adapter_name!r} has trained biases of the model ({biases[0]} and "
            f"{len(biases) - 1} more), and the adapter's configuration says bias='none'. They are loaded, and change "
            "the base model for every adapter. Make the adapter with the bias that it was trained with.",
            stacklevel=2,
        )


def _strange(model: nn.Module, expected: dict[str, Any], names: list[str]) -> list[str]:
    """Those that are weights of the model, but for embeddings, which PEFT saves along when they were resized."""
    own = {name.removeprefix(PREFIX) for name in expected}
    weights = {name.removeprefix(PREFIX) for name, _ in (*model.named_parameters(), *model.named_buffers())}
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


def _naming_what_lacks(stock: Any) -> Any:
    """PEFT's `set_peft_model_state_dict`, whose KeyError for a module that is trained whole becomes a sentence.

    Notable: it looks for those before it asks the tuner, so `check_fits` comes too late. Other adapters see no change.
    """

    @wraps(stock)
    def set_peft_model_state_dict(model: Any, state: Any, adapter_name: str = "default", *args: Any, **kw: Any) -> Any:
        try:
            return stock(model, state, adapter_name, *args, **kw)
        except KeyError as error:
            if adapter_name not in model.peft_config or not is_ours(model.peft_config[adapter_name]):
                raise
            raise ValueError(
                f"the checkpoint for the adapter {adapter_name!r} lacks 1 or more of its tensors, {error.args[0]} "
                "among them, of a module that is trained whole. It is incomplete, or was made with other "
                "modules_to_save. Nothing was loaded."
            ) from error

    vars(set_peft_model_state_dict)["of_peft_dynamic"] = True  # a second import of this file wraps nothing twice
    return set_peft_model_state_dict


for module in (peft, peft.utils, peft_model):  # by which names callers have it
    if not hasattr(module.set_peft_model_state_dict, "of_peft_dynamic"):
        module.set_peft_model_state_dict = _naming_what_lacks(module.set_peft_model_state_dict)


class CheckedLoading:
    """Mixed into a tuner: refuses an incomplete or misshapen checkpoint before any of it is loaded."""

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tuner: Any = super()
        remapped: dict[str, torch.Tensor] = tuner._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_fits(model, config, adapter_name, remapped)
        return remapped
