"""One rank of a saved DyLoRA adapter as a stock LoRA, from its file alone: the factors that a loaded model computes.

Notable: `resize_adapter` cuts the update of the full rank to its best approximation, whatever the adapter is. Here the
adapter's own rules hold: its truncation, its scale at the rank, its mixer and its calibration, as in `export_lora`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from peft_dynamic.algebra.checkpoint import LoraCheckpoint, check_apart, read_checkpoint, settings_of, write_checkpoint
from peft_dynamic.algebra.product import Product
from peft_dynamic.algebra.resize import check_groups
from peft_dynamic.export import PEFT_PREFIX
from peft_dynamic.functional.ranks import alpha_at, bases_of, gram_matrices, leading_part, slice_rank
from peft_dynamic.methods import method_of
from peft_dynamic.rules import is_int

Basis = tuple[torch.Tensor, torch.Tensor]


def is_ranked(config: Any) -> bool:
    """Whether an adapter has many ranks of its own: a DyLoRA adapter."""
    method = method_of(config)
    return method is not None and method.ranked


def write_rank(adapter: str | os.PathLike[str], out: str | os.PathLike[str], rank: int, engine: str = "peft") -> Path:
    """Write one rank of a saved DyLoRA adapter as a stock LoRA adapter, without its base model.

    The tensors are those that `export_lora(model, out, rank=rank)` writes for the loaded adapter in the file's dtype.

    Args:
        adapter: its folder.
        out: the folder to write.
        rank: from 1 to r.
        engine: who reads it, as in `export_lora`.

    Returns:
        `out`.

    Raises:
        ValueError: it is no DyLoRA adapter, has no such rank, or as in `read_checkpoint`; or it was calibrated by a
            version that did not write down which measurement belongs to which module.
        FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError: as in `resize_adapter`.
    """
    check_apart([adapter], out)
    read = read_checkpoint(adapter)
    config = read.config
    if not is_ranked(config):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"adapter={str(adapter)!r} is a {kind} adapter, which has one rank. Use resize_adapter.")
    if not is_int(rank) or not 1 <= rank <= config.r:
        raise ValueError(f"rank={rank!r}: must be a whole number from 1 to {config.r}, the adapter's r.")
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    stored = {module: _stored(product, module, tensors) for module, product in read.products.items()}
    ranks = {module: _rank_at(rank, product, config.r) for module, product in stored.items()}
    check_groups(stored, ranks, f"rank={rank!r}")
    bases = _bases(stored, ranks, tensors, str(adapter)) if config.truncation == "svd" else {}
    products = {}
    for module, product in stored.items():
        alpha = alpha_at(config.scaling, settings_of(config, product.keys[0])[1], ranks[module], product.rank)
        cut = _cut(product, ranks[module], _mixer(tensors, module), bases.get(module))
        products[module] = replace(cut, scale=alpha / ranks[module])
    return write_checkpoint(LoraCheckpoint(read.name, config, products, read.others), out, engine)


def _stored(product: Product, module: str, tensors: Mapping[str, torch.Tensor]) -> Product:
    """The product with its factors as they are in the file: `read_checkpoint` has multiplied a mixer into A."""
    return replace(product, a=tensors[module + product.ends[0]], b=tensors[module + product.ends[1]])


def _mixer(tensors: Mapping[str, torch.Tensor], module: str) -> torch.Tensor | None:
    return tensors.get(f"{module}.lora_mixer.weight")


def _rank_at(rank: int, product: Product, largest: int) -> int:
    """Fused projections have several ranks for one of the adapter; a capped module stays at its cap."""
    return min(rank * max(1, product.rank // largest), product.rank)


def _cut(product: Product, rank: int, mixer: torch.Tensor | None, basis: Basis | None) -> Product:
    """What `tuners.dylora.ranks.RankedFactor` shows at this rank."""
    a, b = product.matrices
    steps = rank // product.groups
    if basis is not None:
        return product.with_factors(
            leading_part(a, 0, steps, basis, mixer), leading_part(b, 1, steps, basis), product.scale
        )
    groups = product.experts * product.groups
    across = (1, 1) if product.experts == 1 else (1, product.experts)
    short_b = slice_rank(product.b, 1, steps, product.steps, across)
    if mixer is None:
        short_a = slice_rank(product.a, 0, steps, product.steps, (groups, 1))
    else:
        mixed = mixer[:, :steps, :steps].to(product.a) @ a[:, :steps]
        short_a = mixed.reshape(-1, *product.a.shape[1:])
    return replace(product, a=short_a.contiguous(), b=short_b.contiguous())


def _bases(
    products: Mapping[str, Product], ranks: Mapping[str, int], tensors: Mapping[str, torch.Tensor], shown: str
) -> dict[str, Basis]:
    """E and F of each module that is cut; those of equal rank in one batch, as a loaded model makes them."""
    measured = _measured(products, tensors, shown)
    alike: dict[int, list[tuple[str, torch.Tensor, torch.Tensor]]] = {}
    for module, product in products.items():
        if ranks[module] == product.rank:
            continue
        plain = gram_matrices(*product.matrices, _mixer(tensors, module))
        gram_a, gram_b = measured.get(module, plain)
        alike.setdefault(product.steps, []).append((module, gram_a, gram_b))
    found: dict[str, Basis] = {}
    for group in alike.values():
        sizes = [len(gram_a) for _, gram_a, _ in group]
        e, f = bases_of(torch.cat([gram_a for _, gram_a, _ in group]), torch.cat([gram_b for _, _, gram_b in group]))
        for (module, _, _), e_part, f_part in zip(group, e.split(sizes), f.split(sizes), strict=True):
            dtype = torch.promote_types(products[module].a.dtype, torch.float32)
            found[module] = e_part.to(dtype), f_part.to(dtype)
    return found


def _measured(products: Mapping[str, Product], tensors: Mapping[str, torch.Tensor], shown: str) -> dict[str, Basis]:
    """What a calibration measured, module -> (K_A, K_B); nothing where there is none that still holds."""
    held = {key.rpartition(".lora_schedule.")[2]: value for key, value in tensors.items() if ".lora_schedule." in key}
    if not {"moments", "moments_step", "step"} <= held.keys() or not torch.equal(held["moments_step"], held["step"]):
        return {}
    names = (
        bytes(held.get("moments_of", torch.empty(0, dtype=torch.uint8)).tolist()).decode(errors="replace").split("\n")
    )
    modules = {module.removeprefix(PEFT_PREFIX): module for module in products}
    counts = [2 * _gram_shape(products[modules[name]]).numel() for name in names if name in modules]
    if len(names) != len(modules) or len(counts) != len(names) or sum(counts) != len(held["moments"]):
        raise ValueError(
            f"adapter={shown!r} was calibrated, and its file does not say which measurement is of which module. Load "
            "it on its base model and use export_lora, or calibrate it again."
        )
    parts = held["moments"].split(counts)
    found = {}
    for name, part in zip(names, parts, strict=True):
        gram_a, gram_b = part.double().view(2, *_gram_shape(products[modules[name]]))
        found[modules[name]] = gram_a, gram_b
    return found


def _gram_shape(product: Product) -> torch.Size:
    return torch.Size((product.experts * product.groups, product.steps, product.steps))
