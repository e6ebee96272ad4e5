"""Any smaller rank of a finished LoRA adapter, or ranks per module for a budget."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils.other import get_pattern_key
from torch import nn

from peft_dynamic.algebra.checkpoint import LoraCheckpoint, check_apart, read_checkpoint, write_checkpoint
from peft_dynamic.algebra.experts import host_of
from peft_dynamic.algebra.product import Product
from peft_dynamic.engines import check_engine
from peft_dynamic.functional.products import allocate, nothing_left, singular_values
from peft_dynamic.functional.products import cut as cut_to
from peft_dynamic.rules import check_patterns, is_finite, is_int, is_number, plain
from peft_dynamic.tuners.dylora.weigh import check_cut
from peft_dynamic.tuners.moments import AdapterMoments


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
    engine: str = "peft",
) -> Path | str:
    """Write a smaller LoRA adapter: each module's update cut to its best approximation of a lower rank.

    Every module keeps leading singular components of s B A, computed through r x r matrices. A file is resized without
    its base model. With `parameters` or `bytes` all modules share one budget: components are taken by squared singular
    value over size, so that the components of a smaller budget are among those of a larger one, and a module that gets
    none is left out of the targets. At the full rank the tensors stay as they are.

        resize_adapter("runs/sql", "runs/sql-4", rank=4)
        resize_adapter("runs/sql", "runs/sql-quarter", parameters=0.25)

    Args:
        adapter: a folder, or a name on the Hub, with a LoRA adapter (rsLoRA, `rank_pattern`, `alpha_pattern` and
            `target_parameters` included), a DyLoRA or a MoSLoRA adapter, or a LoRETTA_rep adapter with a
            `tensor_shape`; or a `PeftModel` whose active adapter is a LoRA.
        out: the folder to write; with a model, the name of a new adapter in it.
        rank: the rank of all modules, at most which they have; or a dict from patterns, as in `rank_pattern`, to
            ranks, 0 leaving a module out, for modules that match one. Of experts it is the rank of each.
        parameters: the budget in numbers; a share of those that there are, from 0 to 1, if it is a float.
        bytes: the budget in bytes.
        moments: what `adapter_moments` measured of this adapter; components are then those that matter most on these
            data. None for a cut by the weights alone.
        damping: how much of the plain cut is in a calibrated one, see `functional.products.grams`.
        cut: "inputs" weighs by what the modules see, so that their outputs change least; "loss" also by the gradients,
            so that the loss does, to second order; "plain" by neither; "auto" takes what the moments have.
        engine: who reads the file, as in `export_lora`. For "vllm" and "llama.cpp", which know one rank, all modules
            are padded with zeros to the largest, so that a budget counts what they hold before.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError: not one of the three was given, or it has no meaning for this adapter.
        FileNotFoundError, ValueError: as in `read_checkpoint`.
        FileExistsError, NotADirectoryError, PermissionError: as in `export_lora`. Nothing is written then.
    """
    check_engine(engine)
    if isinstance(adapter, nn.Module):
        if engine != "peft":
            raise ValueError(
                f"engine={engine!r}: must be 'peft' for an adapter in a model. Resize its folder for others."
            )
        budget = {"rank": rank, "parameters": parameters, "bytes": bytes}
        adapter = getattr(adapter, "_orig_mod", adapter)  # torch.compile's wrapper
        return _resize_loaded(adapter, str(out), **budget, moments=moments, damping=damping, cut=cut)
    check_apart([adapter], out)
    read = read_checkpoint(adapter)
    weights = weights_of(read, moments, damping, cut)
    ranks = wanted_ranks(read, rank, parameters, bytes, weights)
    scales = _scales(read, ranks)
    products = {
        module: _cut(product, ranks[module], scales[module], weights[module])
        for module, product in read.products.items()
    }
    note = _note(ranks, cut if cut != "auto" or moments is None else "loss" if moments.losses else "inputs")
    return write_checkpoint(replace(read, products=products), out, engine, note=note)


def _note(ranks: Mapping[str, int], cut: str) -> str:
    """How an adapter was cut, for its card."""
    there = sorted({rank for rank in ranks.values() if rank}) or [0]  # no module left: refused when it is written
    span = f"rank {there[0]}" if len(there) == 1 else f"ranks {there[0]} to {there[-1]}, by module"
    how = {"inputs": "by what the modules see", "loss": "by the loss"}.get(cut, "by the weights alone")
    return f"Cut from a larger adapter: {span}; cut {how}."


def _scales(read: LoraCheckpoint, ranks: Mapping[str, int]) -> dict[str, float]:
    """The scale that each module gets: its own, but for parameters of one module, which are cut to one of them.

    At one rank and different scales no file tells which parameter is which.
    """
    scales = {module: product.scale for module, product in read.products.items()}
    hosts: dict[str, list[str]] = {}
    for module, product in read.products.items():
        if product.of_parameter:
            hosts.setdefault(host_of(module), []).append(module)
    for modules in hosts.values():
        uncut = [module for module in modules if ranks[module] == read.products[module].rank]
        common = scales[(uncut or modules)[0]]
        scales |= {module: common for module in modules if module not in uncut and common}
    return scales


def _resize_loaded(model: Any, name: str, **budget: Any) -> str:
    configs = getattr(model, "peft_config", {})
    if name in configs:
        raise ValueError(f"out={name!r} is an adapter of the model already. Pass the name of a new one.")
    if not name or "." in name:
        raise ValueError(f"out={name!r}: must be the name of a new adapter of the model, without a dot.")
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"adapter: must be a folder or a PeftModel, got a {type(model).__name__}. Write its adapter with "
            "export_lora, and pass that folder."
        )
    active = model.active_adapter
    kind = getattr(configs.get(active), "peft_type", None)
    if kind != "LORA":
        raise ValueError(
            f"adapter: the model's active adapter is of type {getattr(kind, 'value', kind)}, and a PeftModel holds "
            "adapters of one type. Write it with export_lora, and pass that folder."
        )
    if configs[active].bias != "none":
        raise ValueError(
            f"adapter: the adapter {active!r} has bias={configs[active].bias!r}, and a PeftModel holds one adapter "
            "with trained biases. Write it with save_pretrained, and pass that folder."
        )
    modes = {module: module.training for module in model.modules()}
    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(work, selected_adapters=[active])
        whole = Path(work) if active == "default" else Path(work) / str(active)
        resize_adapter(whole, Path(work) / "resized", **budget)
        model.load_adapter(str(Path(work) / "resized"), adapter_name=name)
    for module in model.modules():  # PEFT has put the whole model into eval mode
        module.training = modes.get(module, modes[model])
    return name


def weights_of(
    read: LoraCheckpoint, moments: AdapterMoments | None, damping: float, how: str, name: str = "moments"
) -> dict[str, tuple[Any, ...]]:
    """Module -> the further arguments of `functional.products.grams`; `name` is what messages call the moments."""
    check_cut(moments, damping, how)
    if how == "auto":
        how = "plain" if moments is None else "loss" if moments.losses else "inputs"
    if how == "plain":
        return dict.fromkeys(read.products, ())
    assert moments is not None  # by check_cut
    weights: dict[str, tuple[Any, ...]] = {}
    for module, product in read.products.items():
        if product.experts * product.groups > 1:
            raise ValueError(
                f"{name}: {module} has {product.experts * product.groups} experts or groups, of which there are no "
                "moments. Cut this adapter without moments."
            )
        pair = (moments.inputs.get(module), moments.losses.get(module) if how == "loss" else None)
        sizes = [len(moment) for moment in pair if moment is not None]
        if pair[0] is None or any(size != product.rank for size in sizes):
            raise ValueError(
                f"{name}: they are of another adapter, and have none of rank {product.rank} for {module}. Measure "
                "them of this adapter with adapter_moments."
            )
        if not moments.may_be_of(module, *(factor[0] for factor in product.matrices)):
            raise ValueError(
                f"{name}: they were measured with other factors of {module}: of another adapter, or before it was "
                "trained on. Measure them of this adapter with adapter_moments."
            )
        if not all(bool(moment.isfinite().all()) for moment in pair if moment is not None):
            raise ValueError(f"{name}: those of {module} are not finite. Measure again, without the batch that did it.")
        weights[module] = (pair, float(damping))
    return weights


def _cut(product: Product, rank: int, scale: float, weights: tuple[Any, ...]) -> Product:
    if rank == product.rank:
        return product
    a, b = product.matrices
    if rank:
        a, b = cut_to(a, b, rank // product.groups, *weights)
    else:
        a, b = a[:, :0], b[:, :, :0]
    return product.with_factors(a, b if scale == product.scale else b * (product.scale / scale), scale)


def spectra(read: LoraCheckpoint, weights: Mapping[str, tuple[Any, ...]] | None = None) -> dict[str, list[float]]:
    """Module -> the singular values of its s B A, largest first; weighted where weights are given.

    Of experts and groups the i-th is the root of the sum of their squared i-th ones.
    """
    found = {}
    for module, product in read.products.items():
        values = singular_values(*product.matrices, *(weights or {}).get(module, ()))
        found[module] = (abs(product.scale) * values.square().sum(0).sqrt()).tolist()
    return found


def wanted_ranks(
    read: LoraCheckpoint,
    rank: int | Mapping[str, int] | None,
    parameters: int | float | None,
    bytes: int | None,
    weights: Mapping[str, tuple[Any, ...]] | None = None,
) -> dict[str, int]:
    """Module -> the rank that the arguments of `resize_adapter` ask for."""
    rank, parameters = plain(rank), plain(parameters)
    given = {"rank": rank, "parameters": parameters, "bytes": bytes}
    set_ones = [name for name, value in given.items() if value is not None]
    if len(set_ones) != 1:
        raise ValueError(f"pass one of rank, parameters and bytes, got {', '.join(set_ones) or 'none'}.")
    if rank is not None:
        return _by_rank(read, rank)
    if bytes is not None:
        _check(is_int(bytes) and bytes > 0, "bytes", bytes, "a whole number of at least 1")
        return _within(read, int(bytes), weights, bytes, in_bytes=True)
    if isinstance(parameters, float):
        _check(is_finite(parameters) and 0 < parameters <= 1, "parameters", parameters, "a share above 0 and at most 1")
        return _within(read, int(parameters * read.size), weights, parameters)
    count = parameters if is_int(parameters) and parameters is not None else 0
    _check(count > 0, "parameters", parameters, "a count of at least 1, or a share as a float up to 1.0")
    return _within(read, int(count), weights, count)


def _within(
    read: LoraCheckpoint,
    budget: int,
    weights: Mapping[str, tuple[Any, ...]] | None,
    given: int | float,
    in_bytes: bool = False,
) -> dict[str, int]:
    """Ranks for a budget of numbers or bytes; what shares a rank is one item, at the sums of worth and cost."""
    alone = spectra(read, weights)
    values, costs = {}, {}
    for first, *more in read.shared:
        products = [read.products[module] for module in (first, *more)]
        steps = zip(*(alone[module] for module in (first, *more)), strict=True)
        values[first] = [math.hypot(*step) for step in steps]
        costs[first] = sum(p.cost * (p.a.element_size() if in_bytes else 1) for p in products)
    found = allocate(values, costs, budget)
    if not any(found.values()):
        raise ValueError(nothing_left(values, costs, given, "bytes" if in_bytes else "parameters"))
    return {module: found[group[0]] * read.products[module].groups for group in read.shared for module in group}


def _by_rank(read: LoraCheckpoint, rank: int | Mapping[str, int]) -> dict[str, int]:
    ranks = {module: product.rank for module, product in read.products.items()}
    if not isinstance(rank, Mapping):
        _check(is_int(rank) and rank >= 1, "rank", rank, "a whole number of at least 1")
        most = max(ranks.values())
        _check(rank <= most, "rank", rank, f"at most {most}, the largest rank of the adapter")
        wanted = {module: min(int(rank), has) for module, has in ranks.items()}
        check_groups(read.products, wanted, f"rank={rank!r}")
        return wanted
    check_patterns(f"rank={rank!r}", rank)
    used: set[str] = set()
    for module, has in ranks.items():
        product = read.products[module]
        found = {key: get_pattern_key(list(rank), key) for key in product.keys}
        chosen = {key: rank[pattern] for key, pattern in found.items() if pattern in rank}
        used.update(pattern for pattern in found.values() if pattern in rank)
        if not chosen:
            continue
        if len(chosen) < len(found) or len(set(chosen.values())) > 1:
            raise ValueError(
                f"rank={rank!r}: the file does not tell which of {[*found]} is which, so that they keep one rank. Pass "
                f"a pattern that matches all of them."
            )
        pattern = found[next(iter(chosen))]
        value = rank[pattern]
        rule = f"a whole number from 0 to {has}, the rank of {module}"
        _check(is_int(value) and 0 <= value <= has, f"rank[{pattern!r}]", value, rule)
        ranks[module] = int(value)
        check_groups({module: product}, ranks, f"rank[{pattern!r}]={value!r}")
    unused = [key for key in rank if key not in used]
    _check(not unused, "rank", rank, f"patterns that match a module; {unused} match none")
    return ranks


def check_groups(products: Mapping[str, Product], ranks: Mapping[str, int], given: str) -> None:
    """Raise ValueError where a convolution would have a rank that its groups do not divide."""
    for module, product in products.items():
        if ranks[module] % product.groups:
            raise ValueError(
                f"{given}: {module} is a convolution of {product.groups} groups, whose rank is a multiple of "
                f"{product.groups}, and got {ranks[module]}. Pass a multiple, or a dict with one for this module."
            )


def _check(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise (ValueError if is_number(value) or isinstance(value, Mapping) else TypeError)(
            f"{name}={value!r}: must be {rule}."
        )
