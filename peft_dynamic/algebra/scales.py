"""ScaLearn's sources, read and stacked; scales learned over adapters that are loaded; and their sum, written."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peft_dynamic.algebra.checkpoint import (
    LoraCheckpoint,
    folder_of,
    read_checkpoint,
    stock_config,
    targets_of,
)
from peft_dynamic.algebra.merge import check_together
from peft_dynamic.algebra.product import Product
from peft_dynamic.algebra.resize import resize_adapter
from peft_dynamic.algebra.stock import is_ranked, stock_checkpoint
from peft_dynamic.export import PEFT_PREFIX, export_lora
from peft_dynamic.tuners.moments import AdapterMoments
from peft_dynamic.tuners.scalearn import ScaLearnConfig


@dataclass
class Stack:
    """The sources' factors beside each other: A and B of equation (2) in `functional.scales`.

    Attributes:
        config: of a LoRA with these factors.
        tensors: name in its checkpoint -> A or B, in float32.
        sources: module, as PEFT looks it up in `rank_pattern` -> source -> its rank; in a grouped convolution that of
            each group.
        widths: module -> its outputs.
    """

    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    sources: dict[str, dict[str, int]]
    widths: dict[str, int]


def stack_sources(adapters: Mapping[str, str], ranks: Mapping[str, int]) -> Stack:
    """Read the sources of a `ScaLearnConfig`.

    Raises:
        FileNotFoundError, ValueError: as in `read_checkpoint`; a rank is of no DyLoRA adapter; the sources are of
            different base models; or a file does not tell which of a module's parameters is which.

    Warns:
        UserWarning: a source has trained more than its factors and heads.
    """
    read = [_read(name, place, ranks.get(name)) for name, place in adapters.items()]
    check_together(read)
    parts: dict[str, dict[str, Product]] = {}
    for name, each in zip(adapters, read, strict=True):
        for module, product in each.products.items():
            parts.setdefault(module, {})[name] = product
    stacked = {module: _stacked([*of_one.values()]) for module, of_one in parts.items()}
    sources: dict[str, dict[str, int]] = {}
    for module, of_one in parts.items():
        found = {name: product.steps for name, product in of_one.items()}
        for key in stacked[module].keys:
            if sources.setdefault(key, found) != found:
                raise ValueError(
                    f"adapters: {key} has sources of other ranks in one of its parameters than in another, and the "
                    "files do not tell which is which. Use sources with one rank for all parameters of a module."
                )
    config = copy(read[0].config)
    for field, value in targets_of(stacked).items():
        setattr(config, field, value)
    made = LoraCheckpoint("", config, stacked)
    tensors = {}
    for module, product in stacked.items():
        tensors[module + product.ends[0]], tensors[module + product.ends[1]] = product.a, product.b
    widths = {module.removeprefix(PEFT_PREFIX): len(product.b) for module, product in stacked.items()}
    return Stack(stock_config(made, stacked), tensors, sources, widths)


def _read(name: str, place: str, rank: int | None) -> LoraCheckpoint:
    try:
        folder = folder_of(place)
        found = read_checkpoint(folder)
        if is_ranked(found.config):
            found = stock_checkpoint(folder, found.config.r if rank is None else rank)
        elif rank is not None:
            raise ValueError(
                f"source_ranks has rank {rank} for it, and it has one rank: only a DyLoRA adapter has others. Cut it "
                "with resize_adapter, and pass that folder."
            )
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"ScaLearnConfig: adapters[{name!r}]: {error}") from error
    heads = [f".{head}." for head in found.config.modules_to_save or ()]
    beside = [key for key in found.others if not any(head in f".{key}." for head in heads)]
    if beside:
        warnings.warn(
            f"ScaLearnConfig: adapters[{name!r}] has trained {beside[0]} ({len(beside)} such tensors) beside its "
            "factors. They are no product that could be scaled, and are left out.",
            stacklevel=6,
        )
    return replace(found, name=place, others={})


def _stacked(products: Sequence[Product]) -> Product:
    """[A_1; ...; A_T] and [s_1 B_1, ..., s_T B_T] in the layout of a file, in float32 and at scale 1."""
    kind = min(products, key=lambda product: len(product.keys))  # one file may tell apart what another does not
    kind = replace(kind, a=kind.a.float(), b=kind.b.float())
    a = torch.cat([product.matrices[0].float() for product in products], dim=1)
    b = torch.cat([(product.matrices[1].double() * product.scale).float() for product in products], dim=2)
    return kind.with_factors(a, b, 1.0)


def learn_scales(
    model: PeftModel,
    names: Sequence[str],
    *,
    shape: str = "vector",
    shared: bool = False,
    omega_init: float = 2.0,
    omega_dropout: float = 0.3,
    modules_to_save: Sequence[str] | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Turn adapters that are loaded in a model into the sources of a ScaLearn adapter, and train its scales alone.

        model = PeftModel.from_pretrained(base, "runs/sql", adapter_name="sql")
        model.load_adapter("runs/chat", "chat")
        model = learn_scales(model, ["sql", "chat"])
        ...  # train it as usual
        model.merge("target", rank=16)  # one stock LoRA

    It is `get_peft_model(base, ScaLearnConfig(...))` for adapters that are in memory: a DyLoRA adapter at the rank that
    is set, a LoRETTA_rep adapter of any shape, and one over a quantised base as it is.

    Args:
        model: with the adapters. PEFT lets a model have adapters of one type, so that its base model is taken out of
            it: use what is returned.
        names: of the adapters. Omega's rows are in the order of the alphabet.
        shape: "vector" or "scalar", as in `ScaLearnConfig`.
        shared: one omega for all layers.
        omega_init: the sum of omega's means at the start.
        omega_dropout: the probability with which an entry of omega is dropped in training.
        modules_to_save: trained anew beside the scales, such as a head. PEFT adds the head of a sequence classifier.
        adapter_name: of the new adapter.

    Returns:
        The model with omega to train. Its sources, and heads and norms that they trained, are as before they came.

    Raises:
        ValueError, TypeError: the model has no such adapters, or as in `ScaLearnConfig`. The model is as it was.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"model is a {type(model).__name__}, and must be a PeftModel with the adapters {names!r}. For folders, use "
            "get_peft_model(model, ScaLearnConfig(adapters={...}))."
        )
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise TypeError(f"names={names!r}: must be a list of the model's adapters, {[*model.peft_config]}.")
    unknown = [name for name in names if name not in model.peft_config]
    if unknown:
        raise ValueError(f"names={[*names]!r}: the model has no adapter {unknown[0]!r}, but {[*model.peft_config]}.")
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError("model has a merged adapter, which would stay in its weights. Call unmerge_adapter() first.")
    settings = {"shape": shape, "shared": shared, "omega_init": omega_init, "omega_dropout": omega_dropout}
    with tempfile.TemporaryDirectory() as work:
        places = {
            name: str(export_lora(model, Path(work) / f"{row}", adapter_name=name)) for row, name in enumerate(names)
        }
        config = ScaLearnConfig(
            adapters=places,
            modules_to_save=None if modules_to_save is None else [*modules_to_save],
            task_type=model.peft_config[names[0]].task_type,
            **settings,  # type: ignore[arg-type]  # checked by the configuration
        )
    config.adapters = {name: name for name in names}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([])  # else unloading would leave a source's head in the model
    base: nn.Module = model.unload()
    made = get_peft_model(base, config, adapter_name=adapter_name)
    assert isinstance(made, PeftModel)
    return made


def merge_scales(
    model: nn.Module,
    out: str | os.PathLike[str],
    rank: int | Mapping[str, int] | None = None,
    *,
    moments: AdapterMoments | None = None,
    damping: float = 0.1,
    cut: str = "auto",
    engine: str = "peft",
    adapter_name: str | None = None,
) -> Path:
    """What `ScaLearnModel.merge` does, with the injected base model in front."""
    if rank is None:
        if moments is not None:
            raise ValueError("moments: the exact sum, rank=None, needs none. Pass a rank, or leave moments out.")
        return export_lora(model, Path(out), adapter_name=adapter_name, engine=engine)
    with tempfile.TemporaryDirectory() as work:
        whole = export_lora(model, Path(work) / "whole", adapter_name=adapter_name)
        resize_adapter(whole, out, rank=rank, moments=moments, damping=damping, cut=cut, engine=engine)
    return Path(out)
