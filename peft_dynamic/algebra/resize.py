"""Any smaller rank of a finished LoRA adapter, or ranks per module for a budget."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from peft_dynamic.algebra.checkpoint import LoraCheckpoint, Product, read_checkpoint, write_checkpoint
from peft_dynamic.algebra.moments import AdapterMoments
from peft_dynamic.export import PEFT_PREFIX
from peft_dynamic.functional.products import allocate, singular_values
from peft_dynamic.functional.products import cut as cut_to
from peft_dynamic.rules import is_finite, is_int, is_number


def resize_adapter(
    adapter: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | Mapping[str, int] | None = None,
    parameters: int | float | None = None,
    bytes: int | None = None,
    moments: AdapterMoments | None = None,
    damping: float = 0.1,
    cut: str = "auto",
) -> Path | str:
    """Write a smaller LoRA adapter: each module's update cut to its best approximation of a lower rank.

    Every module keeps leading singular components of s B A, computed through r x r matrices. A file is resized without
    its base model. With `parameters` or `bytes` all modules share one budget: components are taken by squared singular
    value over size, so that the components of a smaller budget are among those of a larger one, and a module that gets
    none is left out of the targets. At the full rank the tensors stay as they are.

    Args:
        adapter: a folder, or a name on the Hub, with a LoRA adapter (rsLoRA, `rank_pattern` and `alpha_pattern`
            included), a DyLoRA or a MoSLoRA adapter; or a `PeftModel` whose active adapter is a LoRA.
        out: the folder to write; with a model, the name of a new adapter in it.
        rank: the rank of all modules, at most which they have; or a dict from patterns, as in `rank_pattern`, to
            ranks, 0 leaving a module out, for modules that match one.
        parameters: the budget in numbers; a share of those that there are, from 0 to 1, if it is a float.
        bytes: the budget in bytes.
        moments: what `adapter_moments` measured of this adapter; components are then those that matter most on these
            data. None for a cut by the weights alone.
        damping: how much of the plain cut is in a calibrated one, see `functional.products.grams`.
        cut: "inputs" weighs by what the modules see, so that their outputs change least; "loss" also by the gradients,
            so that the loss does, to second order; "plain" by neither; "auto" takes what the moments have.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError: not one of the three was given, or it has no meaning for this adapter.
        FileNotFoundError, ValueError: as in `read_checkpoint`.
        FileExistsError, NotADirectoryError, PermissionError: as in `export_lora`. Nothing is written then.
    """
    if isinstance(adapter, nn.Module):
        budget = {"rank": rank, "parameters": parameters, "bytes": bytes}
        return _resize_loaded(adapter, str(out), **budget, moments=moments, damping=damping, cut=cut)
    read = read_checkpoint(adapter)
    weights = _weights(read, moments, damping, cut)
    ranks = wanted_ranks(read, rank, parameters, bytes, weights)
    products = {module: _cut(product, ranks[module], weights[module]) for module, product in read.products.items()}
    return write_checkpoint(replace(read, products=products), out)


def _resize_loaded(model: Any, name: str, **budget: Any) -> str:
    configs = getattr(model, "peft_config", {})
    if name in configs:
        raise ValueError(f"out={name!r} is an adapter of the model already. Pass the name of a new one.")
    active = getattr(model, "active_adapter", None)
    kind = getattr(configs.get(active), "peft_type", None)
    if kind != "LORA":
        raise ValueError(
            f"adapter: the model's active adapter is of type {getattr(kind, 'value', kind)}, and a PeftModel holds "
            "adapters of one type. Write it with export_lora, and pass that folder."
        )
    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(work, selected_adapters=[active])
        whole = Path(work) if active == "default" else Path(work) / str(active)
        resize_adapter(whole, Path(work) / "resized", **budget)
        model.load_adapter(str(Path(work) / "resized"), adapter_name=name)
    return name


def _weights(
    read: LoraCheckpoint, moments: AdapterMoments | None, damping: float, how: str
) -> dict[str, tuple[Any, ...]]:
    """Module -> the further arguments of `functional.products.grams`."""
    if how not in ("auto", "plain", "inputs", "loss"):
        raise ValueError(f"cut={how!r}: must be 'auto', 'plain', 'inputs' or 'loss'.")
    _check(is_number(damping) and damping >= 0 and is_finite(damping), "damping", damping, "a number of at least 0")
    if how == "auto":
        how = "plain" if moments is None else "loss" if moments.losses else "inputs"
    if how == "plain":
        return dict.fromkeys(read.products, ())
    if moments is None or (how == "loss" and not moments.losses):
        raise ValueError(f"cut={how!r} needs moments" + (" with loss=True." if how == "loss" else ": pass moments."))
    weights: dict[str, tuple[Any, ...]] = {}
    for module, product in read.products.items():
        pair = (moments.inputs.get(module), moments.losses.get(module) if how == "loss" else None)
        sizes = [len(moment) for moment in pair if moment is not None]
        if pair[0] is None or any(size != product.rank for size in sizes):
            raise ValueError(
                f"moments: they are of another adapter, and have none of rank {product.rank} for {module}. Measure "
                "them of this adapter with adapter_moments."
            )
        if not all(bool(moment.isfinite().all()) for moment in pair if moment is not None):
            raise ValueError(
                f"moments: those of {module} are not finite. Measure again, without the batch that did it."
            )
        weights[module] = (pair, float(damping))
    return weights


def _cut(product: Product, rank: int, weights: tuple[Any, ...]) -> Product:
    if rank == product.rank:
        return product
    if not rank:
        return product.with_factors(product.matrices[0][:0], product.matrices[1][:, :0], product.scale)
    return product.with_factors(*cut_to(*product.matrices, rank, *weights), product.scale)


def spectra(read: LoraCheckpoint, weights: Mapping[str, tuple[Any, ...]] | None = None) -> dict[str, list[float]]:
    """Module -> the singular values of its s B A, largest first; weighted where weights are given."""
    return {
        module: (abs(product.scale) * singular_values(*product.matrices, *(weights or {}).get(module, ()))).tolist()
        for module, product in read.products.items()
    }


def wanted_ranks(
    read: LoraCheckpoint,
    rank: int | Mapping[str, int] | None,
    parameters: int | float | None,
    bytes: int | None,
    weights: Mapping[str, tuple[Any, ...]] | None = None,
) -> dict[str, int]:
    """Module -> the rank that the arguments of `resize_adapter` ask for."""
    given = {"rank": rank, "parameters": parameters, "bytes": bytes}
    set_ones = [name for name, value in given.items() if value is not None]
    if len(set_ones) != 1:
        raise ValueError(f"pass one of rank, parameters and bytes, got {', '.join(set_ones) or 'none'}.")
    if rank is not None:
        return _by_rank(read, rank)
    costs = {module: product.cost for module, product in read.products.items()}
    if bytes is not None:
        _check(is_int(bytes) and bytes > 0, "bytes", bytes, "a whole number of at least 1")
        sizes = {module: product.a.element_size() for module, product in read.products.items()}
        return allocate(
            spectra(read, weights), {module: cost * sizes[module] for module, cost in costs.items()}, int(bytes)
        )
    if isinstance(parameters, float):
        _check(is_finite(parameters) and 0 < parameters <= 1, "parameters", parameters, "a share above 0 and at most 1")
        return allocate(spectra(read, weights), costs, int(parameters * read.size))
    count = parameters if is_int(parameters) and parameters is not None else 0
    _check(count > 0, "parameters", parameters, "a count of at least 1, or a share as a float up to 1.0")
    return allocate(spectra(read, weights), costs, int(count))


def _by_rank(read: LoraCheckpoint, rank: int | Mapping[str, int]) -> dict[str, int]:
    ranks = {module: product.rank for module, product in read.products.items()}
    if not isinstance(rank, Mapping):
        _check(is_int(rank) and rank >= 1, "rank", rank, "a whole number of at least 1")
        most = max(ranks.values())
        _check(rank <= most, "rank", rank, f"at most {most}, the largest rank of the adapter")
        return {module: min(int(rank), has) for module, has in ranks.items()}
    used = set()
    for module, has in ranks.items():
        key = get_pattern_key(list(rank), module.removeprefix(PEFT_PREFIX))
        if key in rank:
            used.add(key)
            value = rank[key]
            rule = f"a whole number from 0 to {has}, the rank of {module}"
            _check(is_int(value) and 0 <= value <= has, f"rank[{key!r}]", value, rule)
            ranks[module] = int(value)
    unused = [key for key in rank if key not in used]
    _check(not unused, "rank", rank, f"patterns that match a module; {unused} match none")
    return ranks


def _check(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise (ValueError if is_number(value) or isinstance(value, Mapping) else TypeError)(
            f"{name}={value!r}: must be {rule}."
        )
