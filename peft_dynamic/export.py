"""Any rank of an adapter of ours, as a stock LoRA checkpoint that PEFT, vLLM or a converter loads without us."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from peft_dynamic.cards import write_model_card
from peft_dynamic.engines import check_engine, fit
from peft_dynamic.methods import method_of
from peft_dynamic.rules import check_target as check_target  # here before
from peft_dynamic.tuners.as_lora import NOT_LORA
from peft_dynamic.tuners.dylora.model import active_ranked_adapter, at_rank, held
from peft_dynamic.tuners.dylora.ranks import AdapterRanks
from peft_dynamic.tuners.dylora.stock import stock_layers
from peft_dynamic.tuners.factors import active_adapter, viewed_layers
from peft_dynamic.tuners.mixer import SPECTRAL

PEFT_PREFIX = "base_model.model."
# In this order into the target: without a config a folder is no adapter, so a half-written one never loads.
FILES = ("README.md", "adapter_model.safetensors", "adapter_config.json")


def export_lora(
    model: nn.Module,
    save_directory: str | Path,
    rank: int | dict[str, int] | None = None,
    adapter_name: str | None = None,
    *,
    engine: str = "peft",
    uniform_rank: bool | None = None,
) -> Path:
    """Write an adapter as a stock LoRA checkpoint: of a DyLoRA or a LoRA adapter one rank b, with r = b.

    The factors are those that the layers compute with: at rank b of DyLoRA `F[:b] A` and `B E[:, :b]` of
    `functional.ranks.leading_components` under truncation="svd", the first b rows of A and columns of B under
    truncation="prefix"; for MoSLoRA M A and B; for LoRETTA_rep the matrices of its tensor trains (with noise removal
    those of the start beside them, so r is twice the bottleneck), and its classifier as an ordinary linear layer. Of a
    stock LoRA rank b has its leading singular components, as with truncation="svd". A module at rank 0 is left out.

    Loaded by PEFT in a process that never imports peft_dynamic, it computes what the model computes at that rank.
    `lora_alpha` is such that PEFT's scale lora_alpha / r is ours. Biases, `modules_to_save` and trainable tokens come
    along. A factor set by PEFT's `set_scale` or `scale_layer` does not, as in `save_pretrained`.

    The three files (adapter_config.json, adapter_model.safetensors, README.md) are made beside the target and moved at
    the end, so that a failure leaves what was there before. A stock LoRA adapter in the target is replaced, other
    files stay.

    Args:
        model: a `PeftModel`, or a transformers model with the adapter added by `add_adapter` or `load_adapter`.
        save_directory: the folder to write; made if missing.
        rank: of a DyLoRA or LoRA adapter: the rank, or a dict from module names or patterns to ranks as in `set_rank`;
            None for the rank in use. Adapters of other methods have one, so None.
        adapter_name: the adapter; None for the first active one.
        engine: who reads the file. "vllm" and "llama.cpp" (its converter) read the matrices of linear layers and one
            scale: the file is brought into that form, and what they would drop (trained norms and biases, DoRA,
            embeddings, experts, `modules_to_save`) is refused.
        uniform_rank: pad all modules with zeros to one rank and fold differing scales into B, so that the file has no
            `rank_pattern` and no `alpha_pattern`; None for where the engine knows neither.

    Returns:
        `save_directory`.

    Raises:
        FileExistsError: the target is a file, or holds an adapter that is more than a stock LoRA: writing over it would
            lose what that lacks.
        NotADirectoryError, PermissionError: there can be no such folder, or nothing can be written in it.
        ValueError: the model has no such adapter, the rank is out of range, the ranks cannot be written as
            `rank_pattern`, or the engine would compute something else.
    """
    check_engine(engine)
    target = check_target(save_directory)
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    name = _adapter(model, adapter_name)
    configs: Any = model.peft_config
    method = method_of(configs[name])  # none for a stock LoRA
    if rank is not None and method is not None and not method.ranked:
        raise ValueError(
            f"rank={rank!r}: the adapter {name!r} is of {method.title}, which has one rank. Pass rank=None."
        )
    if method is not None and engine not in method.engines:
        raise ValueError(f"engine={engine!r}: {method.title} is not read by it, but by {', '.join(method.engines)}.")
    ranked = held(model, [name]) if method is None else nullcontext()
    with ranked, nullcontext() if rank is None else at_rank(model, rank, name):
        tensors = _tensors(model, name)
        config, auto_mapping = _config(model, name)
        tensors, config = fit(tensors, config, engine, uniform_rank, _ranks(model, name))
    with _working_folder(target) as work:
        made = work / target.name
        config.save_pretrained(str(made), auto_mapping_dict=auto_mapping)
        save_file(tensors, made / "adapter_model.safetensors", metadata={"format": "pt"})
        write_model_card(made)
        target.mkdir(exist_ok=True)
        for file in FILES:
            os.replace(made / file, target / file)
    return Path(save_directory)


def _adapter(model: nn.Module, adapter_name: str | None) -> str:
    """The named adapter, or the first active one: of ours, or else a stock LoRA."""
    stock = {name for name, config in getattr(model, "peft_config", {}).items() if config.peft_type == "LORA"}
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    ours = {name for layer in layers for name in getattr(layer, "lora_views", {}) if name not in stock}
    active = {name for layer in layers for name in layer.active_adapters}
    wanted = active if adapter_name is None else {adapter_name}
    if not wanted & ours and wanted & stock and stock_layers(model, adapter_name):
        return active_ranked_adapter(model, adapter_name)
    return active_adapter(model, adapter_name)


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """A folder to make the files in: on the target's file system, and gone afterwards.

    It is in the target if that is there, which may be a mount or stand in a folder where we may not write.
    """
    there = target.is_dir()
    place = target if there else target.parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{target.name}-") as work:
        yield Path(work)


def _tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The adapter's checkpoint as PEFT would save it, but with each factor as the layer shows it."""
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    for prefix, layer in viewed_layers(model, name):
        if _is_dropped(model, layer, name):
            for part in ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"):
                tensors.pop(f"{prefix}.{part}", None)
            continue
        keys = (
            (f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight")
            if name in layer.lora_A
            else (f"{prefix}.lora_embedding_A", f"{prefix}.lora_embedding_B")
        )
        for key, (holder, _, view) in zip(keys, layer.lora_views[name].parts, strict=True):
            if view.made_from:
                _put_matrix(tensors, key.removesuffix(".weight"), view.made_from, holder.weight)
            elif holder in layer.modules():
                tensors[key] = view.anew(tensors[key])
            elif view.groups == (1, 1):
                # prepare_model_for_compiled_hotswap put a copy of the part in use there, with zeros behind it
                tensors[key] = tensors[key].narrow(view.dim, 0, layer.r[name])
            else:
                raise ValueError(
                    f"{prefix}: prepare_model_for_compiled_hotswap replaced its factors. Export before that call."
                )
    for key, module in model.named_modules():
        made_from: Any = getattr(module, "made_from", ())
        if made_from and (own := f".modules_to_save.{name}.") in f"{key}.":
            linear: Any = module
            _put_matrix(tensors, f"{key}.".replace(own, ".").removesuffix("."), made_from, linear.matrix().mT)
    prefix = "" if isinstance(model, PeftModel) else PEFT_PREFIX
    return {
        prefix + key: tensor.detach().cpu().contiguous().clone()  # a file holds no views and no tensor twice
        for key, tensor in tensors.items()
        if not any(part in key for part in NOT_LORA)
    }


def _is_dropped(model: Any, layer: Any, name: str) -> bool:
    """Whether the layer is at rank 0, and one that the file can do without; others keep a component of zeros.

    With trained biases PEFT looks for those of a layer where its adapter is.
    """
    at_zero = isinstance(state := layer.lora_views[name], AdapterRanks) and state.rank == 0
    whole = model.peft_config[name].bias != "none" or isinstance(layer, MultiheadAttention | ParamWrapper)
    return at_zero and not whole


def only(kept: list[str], dropped: Iterable[str]) -> list[str] | str:
    """`target_modules` for these modules: their names, or an expression where a name ends one that is left out.

    PEFT takes a name in a list as the end of a module's.
    """
    if any(out.endswith(f".{name}") for name in kept for out in dropped):
        return "|".join(f"({re.escape(name)})" for name in kept)
    return kept


def _put_matrix(
    tensors: dict[str, torch.Tensor], prefix: str, made_from: tuple[str, ...], weight: torch.Tensor
) -> None:
    """A weight in place of the tensors that it is made from."""
    for key in made_from:
        tensors.pop(f"{prefix}.{key}", None)
    tensors[f"{prefix}.weight"] = weight


def _trained_whole(model: nn.Module, name: str, listed: Iterable[str]) -> list[str]:
    """`modules_to_save` that has the same effect in PEFT: `listed`, and what a tuner of ours trains beside it."""
    wrapped = [
        key.removeprefix(PEFT_PREFIX)
        for key, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
    ]
    return [*listed, *(key for key in wrapped if not any(key.endswith(end) for end in listed))]


def _config(model: Any, name: str) -> tuple[LoraConfig, dict[str, str] | None]:
    """The stock config of the adapter at the rank in use, and PEFT's note of the model's class where it writes one."""
    ours = model.peft_config[name]
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    values = {item.name: copy(getattr(ours, item.name)) for item in fields(LoraConfig) if item.init}
    values.pop("peft_type", None)
    layers = _named_layers(model, name)
    kept = [(key, layer) for key, layer in layers if not _is_dropped(model, layer, name)]
    if not kept:
        raise ValueError(
            f"the adapter {name!r} is at rank 0 in all modules: there is nothing to write. Raise the rank."
        )
    settings = {key: (layer.r[name], as_whole(layer.lora_alpha[name])) for key, layer in kept}
    rank, alpha = Counter(settings.values()).most_common(1)[0][0]
    values |= {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exactly(key): b for key, (b, _) in settings.items() if b != rank},
        "alpha_pattern": {exactly(key): a for key, (_, a) in settings.items() if a != alpha},
        "modules_to_save": _trained_whole(model, name, ours.modules_to_save or []) or None,
        "inference_mode": True,
        "base_model_name_or_path": ours.base_model_name_or_path or base.__dict__.get("name_or_path") or None,
    }
    if values["init_lora_weights"] == SPECTRAL:  # which PEFT does not know
        values["init_lora_weights"] = True
    if ours.peft_type == "LORA":  # of which the layers at hand have the scale in lora_alpha
        values["use_rslora"] = False
    if len(kept) < len(layers):
        plain = [key for key, layer in kept if not isinstance(layer, ParamWrapper)]
        dropped = [key for key, layer in layers if _is_dropped(model, layer, name)]
        values |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        values |= {"target_modules": only(plain, dropped), "init_lora_weights": True}
    mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return LoraConfig(**values), None if ours.task_type else mapping


def _ranks(model: nn.Module, name: str) -> dict[str, tuple[int, float]]:
    """Each layer's rank and alpha, under the name that it has in the checkpoint."""
    prefix = "" if isinstance(model, PeftModel) else PEFT_PREFIX
    return {prefix + key: (layer.r[name], layer.lora_alpha[name]) for key, layer in viewed_layers(model, name)}


def _named_layers(model: nn.Module, name: str) -> list[tuple[str, LoraLayer]]:
    """Each layer that takes its rank from the config, under the name that PEFT looks up in `rank_pattern`."""
    found: list[tuple[str, LoraLayer]] = []
    inner: dict[int, LoraLayer] = {}
    for key, layer in viewed_layers(model, name):
        if id(layer) in inner:  # MultiheadAttention's out_proj has its owner's rank
            owner = inner[id(layer)]
            if (layer.r[name], layer.lora_alpha[name]) != (owner.r[name], owner.lora_alpha[name]):
                raise ValueError(
                    f"{key} is at rank {layer.r[name]} and the attention around it at {owner.r[name]}: a LoRA "
                    "checkpoint has one rank for both. Set them alike before the export."
                )
            continue
        if isinstance(layer, MultiheadAttention):
            inner[id(layer.get_base_layer().out_proj)] = layer
        if isinstance(layer, ParamWrapper):  # wrappers of several parameters of one module are nested
            key = f"{key.replace('.base_layer', '')}.{layer.parameter_name}"
        found.append((key.removeprefix(PEFT_PREFIX), layer))
    return found


def exactly(key: str) -> str:
    """A `rank_pattern` key that matches this module alone: PEFT reads it as the end of a name, and as an expression."""
    return "^" + key.replace(".", r"\.")


def as_whole(value: float) -> float:
    """A number as an int where it is one, as in a config that a user writes."""
    return int(value) if float(value).is_integer() else value
