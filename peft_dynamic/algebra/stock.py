"""An adapter of ours, of DyLoRA one rank of it, as a stock LoRA: from its files alone, as `export_lora` writes it.

Notable: the operations, their order and their dtypes are those of the layers (`tuners.computed`, `tuners.dylora`), so
that the factors are equal to the bit. PEFT widens half-precision factors when it loads them; so does this, unless the
file's own dtype is wanted. `resize_adapter` cuts the update of the full rank to its best approximation, whatever the
adapter is. Here the adapter's own rules hold: its truncation, its scale at the rank, its mixer and its calibration.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from peft_dynamic.algebra.checkpoint import (
    SCALES,
    UNTOLD,
    LoraCheckpoint,
    check_apart,
    read_checkpoint,
    scaled,
    settings_of,
    write_checkpoint,
)
from peft_dynamic.algebra.product import Product
from peft_dynamic.algebra.resize import check_groups
from peft_dynamic.cards import model_class_name
from peft_dynamic.export import PEFT_PREFIX
from peft_dynamic.functional.ranks import alpha_at, bases_of, gram_matrices
from peft_dynamic.methods import method_of
from peft_dynamic.rules import is_int
from peft_dynamic.tuners.lora_fields import check_product

_MOMENTS = ".lora_schedule.moments"


def is_calibrated(folder: Path) -> bool:
    """Whether it is a DyLoRA adapter with a calibration."""
    return _has(folder, _MOMENTS)


def needs_order(folder: Path) -> bool:
    """Whether its calibration is in the order of the base model's layers, and the file does not say which that is."""
    return is_calibrated(folder) and not _has(folder, f"{_MOMENTS}_of")


def _has(folder: Path, end: str) -> bool:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return any(name.endswith(end) for name in file.keys())  # noqa: SIM118  # it is no dict


def is_ranked(config: Any) -> bool:
    """Whether an adapter has many ranks of its own: a DyLoRA adapter."""
    method = method_of(config)
    return method is not None and method.ranked


def write_rank(adapter: str | os.PathLike[str], out: str | os.PathLike[str], rank: int, engine: str = "peft") -> Path:
    """Write one rank of a saved DyLoRA adapter as a stock LoRA adapter, without its base model, in the file's dtype.

    Args:
        adapter: its folder.
        out: the folder to write.
        rank: from 1 to r.
        engine: who reads it, as in `export_lora`.

    Returns:
        `out`.

    Raises:
        ValueError: it is no DyLoRA adapter, has no such rank, or as in `stock_checkpoint`.
        FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError: as in `resize_adapter`.
    """
    check_apart([adapter], out)
    config = read_checkpoint(adapter).config
    if not is_ranked(config):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"adapter={str(adapter)!r} is a {kind} adapter, which has one rank. Use resize_adapter.")
    if not is_int(rank) or not 1 <= rank <= config.r:
        raise ValueError(f"rank={rank!r}: must be a whole number from 1 to {config.r}, the adapter's r.")
    return write_checkpoint(stock_checkpoint(adapter, rank, wide=False), out, engine)


def untold(folder: Path, config: Any, written: Mapping[str, Any]) -> str | None:
    """What the files of an adapter do not tell of its LoRA, and the base model's configuration does; None if nothing.

    Args:
        folder: the adapter's.
        config: its configuration.
        written: the same as its file has it.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        return "its weights are no safetensors"
    if written["peft_type"] == "LORETTA_REP":
        return "the shapes of its tensor trains"
    if model_class_name(written)[1] is None:
        return "the class of its base model"
    try:
        check_product(config, "", UNTOLD)
    except ValueError:
        return "how its base model is used"
    products = read_checkpoint(folder).products
    if needs_order(folder) and any(product.of_parameter for product in products.values()):
        return "the order of its parameters"
    return None


def stock_checkpoint(
    adapter: str | os.PathLike[str], rank: int | None = None, order: Sequence[str] | None = None, wide: bool = True
) -> LoraCheckpoint:
    """The checkpoint whose products are what the layers compute with.

    Args:
        adapter: the folder of an adapter of ours.
        rank: of a DyLoRA adapter the rank, from 1 to its r; None for others.
        order: the base model's modules in their order, where the file has a calibration and does not say it
            (`needs_order`); others may be among them.
        wide: whether half-precision factors become float32, as PEFT makes of them when it loads them.

    Raises:
        FileNotFoundError, ValueError: as in `read_checkpoint`; a grouped convolution has no such rank; or which
            measurement is of which module is not known.

    Warns:
        UserWarning: the rank was not trained, or the adapter was trained after its calibration.
    """
    read = read_checkpoint(adapter)
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    if wide:
        tensors = {name: _wide(value) for name, value in tensors.items()}
    products = {
        module: replace(product, a=tensors[module + product.ends[0]], b=tensors[module + product.ends[1]])
        for module, product in read.products.items()
    }
    mixers = {module: tensors.get(f"{module}.lora_mixer.weight") for module in products}
    method = method_of(read.config)
    if method is None or not method.ranked:
        in_b = not getattr(read.config, "train_a", True)
        mixed = {
            module: replace(product, b=product.b @ mixers[module][0].to(product.b))
            if in_b and mixers[module] is not None
            else replace(product, a=_mixed(product, mixers[module]))
            for module, product in products.items()
        }
        scales = {key: value for key, value in tensors.items() if key.endswith(SCALES)}
        return replace(read, products=scaled(mixed, scales, read.config, f"adapter={str(adapter)!r}"))
    assert rank is not None
    config = read.config
    if rank not in config.trained_ranks and config.rank_sampling != "full":
        listed = list(config.trained_ranks)
        warnings.warn(
            f"rank {rank} is not one of the trained ranks {listed}: it works, but was not trained.", stacklevel=2
        )
    most = config.trained_ranks[-1]
    ranks = {module: rank_at(rank, product, most) for module, product in products.items()}
    check_groups(products, ranks, f"rank={rank}")
    cuts = _cuts(products, mixers, ranks, config.truncation, _moments(tensors, products, order))
    made = {}
    for module, product in products.items():  # in their order, by which the configuration's own alpha is chosen
        a, b = cuts[module]
        alpha = alpha_at(config.scaling, settings_of(config, product.keys[0])[1], ranks[module], product.rank)
        made[module] = product.with_factors(a, b, alpha / ranks[module])
    return replace(read, products=made)


def rank_at(rank: int, product: Product, largest: int) -> int:
    """Fused projections have several ranks for one of the adapter; a capped module stays at its cap."""
    return min(rank * max(1, product.rank // largest), product.rank)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _mixed(product: Product, mixer: torch.Tensor | None) -> torch.Tensor:
    """M A in A's layout, at the whole rank."""
    a = product.a
    if mixer is None:
        return a
    m = mixer.to(a)
    return (m[0] @ a.flatten(1)).view(a.shape) if len(m) == 1 else (m @ product.matrices[0]).reshape(a.shape)


def _moments(
    tensors: Mapping[str, torch.Tensor], products: Mapping[str, Product], order: Sequence[str] | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> K_A and K_B of a calibration; none where there was none, or the adapter was trained since."""
    key = next((name for name in tensors if name.endswith(_MOMENTS)), None)
    if key is None:
        return {}
    if int(tensors[f"{key}_step"]) != int(tensors[f"{key.removesuffix('moments')}step"]):
        said = "the adapter has been trained since it was calibrated: its ranks are cut by their weights alone."
        warnings.warn(said, stacklevel=3)
        return {}
    noted = tensors.get(f"{key}_of")
    if noted is not None:
        named = [PEFT_PREFIX + name for name in bytes(noted.tolist()).decode(errors="replace").split("\n")]
        order = named if {*named} == {*products} else order
    if order is None:
        raise ValueError(
            "the adapter was calibrated, and its file does not say which measurement is of which module. Load it on "
            "its base model and use export_lora, or calibrate it again."
        )
    shapes = {module: (len(p.matrices[0]), p.steps, p.steps) for module, p in products.items()}
    listed = [module for module in order if module in products]
    sizes = [2 * torch.Size(shapes[module]).numel() for module in listed]
    if {*listed} != {*products} or sum(sizes) != len(tensors[key]):
        raise ValueError(
            f"adapter: its moments of {len(tensors[key])} numbers do not fit its {len(products)} modules as the base "
            "model has them. Pass the base model that it was trained on."
        )
    parts = zip(listed, tensors[key].split(sizes), strict=True)
    return {module: tuple(part.double().view(2, *shapes[module])) for module, part in parts}


def _cuts(
    products: Mapping[str, Product],
    mixers: Mapping[str, torch.Tensor | None],
    ranks: Mapping[str, int],
    truncation: str,
    moments: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> its factors at its rank, as matrices."""
    cuts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    weighed: dict[int, list[str]] = {}  # those of equal rank in one batch
    for module, product in products.items():
        (a, b), mixer = product.matrices, mixers[module]
        steps = ranks[module] // product.groups
        if steps == product.steps:
            cuts[module] = replace(product, a=_mixed(product, mixer)).matrices
        elif truncation == "svd":
            weighed.setdefault(product.steps, []).append(module)
        elif mixer is None:
            cuts[module] = a[:, :steps], b[:, :, :steps]
        else:
            cuts[module] = mixer.to(a)[:, :steps, :steps] @ a[:, :steps], b[:, :, :steps]
    for modules in weighed.values():
        grams = [moments.get(m) or gram_matrices(*products[m].matrices, mixers[m]) for m in modules]
        sizes = [len(gram) for gram, _ in grams]
        e, f = bases_of(torch.cat([gram for gram, _ in grams]), torch.cat([gram for _, gram in grams]))
        for module, to_b, to_a in zip(modules, e.split(sizes), f.split(sizes), strict=True):
            product, mixer, steps = products[module], mixers[module], ranks[module] // products[module].groups
            a, b = product.matrices
            wide = torch.promote_types(product.a.dtype, torch.float32)
            leading = to_a.to(wide)[:, :steps]
            leading = leading if mixer is None else leading @ mixer.to(leading)
            cuts[module] = leading @ a.to(wide), b.to(wide) @ to_b.to(wide)[:, :, :steps]
    return cuts
