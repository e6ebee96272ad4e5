"""Weighted sums and means of finished LoRA adapters: of their products, not of their factors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from peft_dynamic.algebra.checkpoint import LoraCheckpoint, check_apart, read_checkpoint, targets_of, write_checkpoint
from peft_dynamic.algebra.experts import host_of
from peft_dynamic.algebra.product import Product
from peft_dynamic.algebra.resize import check_groups, weights_of
from peft_dynamic.functional.products import cut, pooled, weighted_sum
from peft_dynamic.rules import is_finite, is_int
from peft_dynamic.tuners.moments import AdapterMoments


def merge_adapters(
    adapters: Mapping[str, float],
    out: str | os.PathLike[str],
    rank: int | None = None,
    *,
    moments: Mapping[str, AdapterMoments] | None = None,
    damping: float = 0.1,
) -> Path:
    """Write the weighted sum of LoRA adapters, sum_t w_t s_t B_t A_t, as one LoRA adapter.

    The sum is exact at the rank that it has, at most the sum of the ranks; a smaller rank is the best approximation of
    it. It is made of products through matrices of the size of the ranks: the scale of each adapter and of each module
    counts, under rsLoRA too. A module that one adapter alone has counts for the others as 0.

    With `moments` the cut changes the modules' outputs least, on the data of all adapters, which count alike. This is
    an approximation: moments tell of an adapter's data what its own A sees, and the others' A see more. There we take
    the data as white, at the mean level of what A sees (equation 6 of `functional.products`). It is exact where all A
    span one space. For an exact cut merge without a rank, load the sum, measure it with `adapter_moments` on data of
    all tasks, and cut it with `resize_adapter`.

        merge_adapters({"runs/sql": 0.7, "runs/chat": 0.3}, "runs/both", rank=16)

    Args:
        adapters: folder, or name on the Hub -> its weight.
        out: the folder to write.
        rank: of each module of the result; None for the exact sum.
        moments: the same folders or names -> what `adapter_moments` measured of each on its own data; their losses are
            not used, since gradients of different losses have no common scale. None for a cut by the weights alone.
        damping: how much of the plain cut is in one by moments, see `functional.products.grams`.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError: there is no adapter, a weight or the rank has no meaning, the adapters are of different
            base models or shapes, or one has trained modules or biases, of which there is no weighted sum; or the
            moments are not those of these adapters, or are given without a rank.
        FileNotFoundError: as in `read_checkpoint`.
        FileExistsError, NotADirectoryError, PermissionError: as in `export_lora`. Nothing is written then.
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise TypeError(f"adapters={adapters!r}: must be a dict from folders or names to weights.")
    for name, weight in adapters.items():
        if not is_finite(weight):
            raise ValueError(f"adapters: the weight of {name!r} must be a finite number, got {weight!r}.")
    check_apart(adapters, out)
    read = [read_checkpoint(name) for name in adapters]
    whole = next((each for each in read if each.others), None)
    if whole is not None:
        raise ValueError(
            f"adapters: {whole.name!r} has trained modules, biases or tokens beside its factors "
            f"({next(iter(whole.others))}), of which there is no weighted sum. Merge adapters without them, average "
            "checkpoints of one run with average_adapters, or cut one adapter with resize_adapter."
        )
    seen = None if moments is None else _own_moments(dict(zip(adapters, read, strict=True)), moments, rank, damping)
    return write_checkpoint(_summed(read, [float(weight) for weight in adapters.values()], rank, seen, damping), out)


def _own_moments(
    read: Mapping[str, LoraCheckpoint], moments: Mapping[str, AdapterMoments], rank: int | None, damping: float
) -> list[dict[str, torch.Tensor]]:
    """For each adapter, module -> E[z z^T]."""
    if not isinstance(moments, Mapping) or moments.keys() != read.keys():
        raise ValueError(
            f"moments: must be a dict with the keys of adapters, {[*read]}. Measure each adapter with adapter_moments, "
            "or leave moments out."
        )
    odd = next((name for name, value in moments.items() if not isinstance(value, AdapterMoments)), None)
    if odd is not None:
        raise TypeError(f"moments[{odd!r}]={moments[odd]!r}: must be what adapter_moments or AdapterMoments.load gave.")
    if rank is None:
        raise ValueError("moments: the exact sum, rank=None, needs none. Pass a rank, or leave moments out.")
    found = []
    for name, each in read.items():
        weights = weights_of(each, moments[name], damping, "inputs", f"moments[{name!r}]")
        found.append({module: pair[0] for module, (pair, _) in weights.items()})
    return found


def average_adapters(
    adapters: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], rank: int | None = None
) -> Path:
    """Write the mean of LoRA adapters, e.g. of the last checkpoints of a run: the mean of their products.

    The mean of the factors is another thing: its product has terms of one adapter's B with another's A.

        average_adapters(["run/checkpoint-100", "run/checkpoint-200"], "runs/mean")

    Args:
        adapters: folders, or names on the Hub.
        out: the folder to write.
        rank: of each module of the result; None for that of the first adapter.

    Returns:
        `out`. Biases, trained modules and trained tokens are averaged too.

    Raises:
        ValueError: as `merge_adapters`, and where one has other trained modules than the first.
    """
    if isinstance(adapters, str | os.PathLike) or not isinstance(adapters, Sequence) or not adapters:
        raise TypeError(f"adapters={adapters!r}: must be a list of folders or names.")
    check_apart(adapters, out)
    read = [read_checkpoint(name) for name in adapters]
    first = read[0]
    for each in read[1:]:
        odd = sorted({*each.others} ^ {*first.others}) or [
            key for key, value in first.others.items() if each.others[key].shape != value.shape
        ]
        if odd:
            raise ValueError(
                f"adapters: {each.name!r} and {first.name!r} differ in {odd[0]}, a tensor beside the factors. Average "
                "checkpoints of one run."
            )
    made = _summed(read, [1 / len(read)] * len(read), rank if rank is not None else _ranks_of(first))
    others = {
        key: torch.stack([each.others[key].double() for each in read]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for key, value in first.others.items()
    }
    return write_checkpoint(replace(made, others=others), out)


def _ranks_of(read: LoraCheckpoint) -> dict[str, int]:
    return {module: product.rank for module, product in read.products.items()}


def _summed(
    read: Sequence[LoraCheckpoint],
    weights: Sequence[float],
    rank: int | dict[str, int] | None,
    moments: Sequence[Mapping[str, torch.Tensor]] | None = None,
    damping: float = 0.1,
) -> LoraCheckpoint:
    if rank is not None and not isinstance(rank, dict) and not (is_int(rank) and rank >= 1):
        kind = ValueError if is_int(rank) else TypeError
        raise kind(f"rank={rank!r}: must be a whole number of at least 1, or None.")
    check_together(read)
    parts: dict[str, list[tuple[Product, float]]] = {}
    for each, weight in zip(read, weights, strict=True):
        for module, product in each.products.items():
            parts.setdefault(module, []).append((product, weight))
    # the kind of each sum; one file may tell apart what another does not
    kinds = {module: min((p for p, _ in of_one), key=lambda p: len(p.keys)) for module, of_one in parts.items()}
    kinds = {module: replace(kinds[module], a=of_one[0][0].a, b=of_one[0][0].b) for module, of_one in parts.items()}
    made = replace(read[0], config=copy(read[0].config), products=kinds, others={})
    named = (each.config.base_model_name_or_path for each in read)
    made.config.base_model_name_or_path = next((base for base in named if base), None)
    steps = _steps(made, parts, rank)
    made.products = {}
    for module, of_one in parts.items():
        seen = [each[module] for each in moments or () if module in each]
        how: tuple[Any, ...] = ()
        if seen:  # of one product alone, with neither experts nor groups
            how = ((pooled([part.matrices[0][0] for part, _ in of_one], seen)[None], None), damping)
        made.products[module] = _sum_of(of_one, kinds[module], steps[module], how)
    if parts.keys() != read[0].products.keys():  # the rule that chose the first one's modules chooses too few
        for name, value in targets_of(made.products).items():
            setattr(made.config, name, value)
    return made


def _steps(
    made: LoraCheckpoint, parts: dict[str, list[tuple[Product, float]]], rank: int | dict[str, int] | None
) -> dict[str, int]:
    """The rank of each module's sum, in steps: at most what it can have, and one for what shares a rank."""
    ranks: dict[str, int] = {}
    for group in made.shared:
        most = 0
        for module in group:
            product, total = made.products[module], sum(part.steps for part, _ in parts[module])
            (_, _, inputs), (_, outputs, _) = (matrices.shape for matrices in product.matrices)
            most = max(most, min(total, inputs, outputs) * product.groups)
        asked = next((rank[m] for m in group if m in rank), None) if isinstance(rank, dict) else rank
        ranks |= dict.fromkeys(group, most if asked is None else min(asked, most))
    check_groups(made.products, ranks, f"rank={rank!r}")
    return {module: value // made.products[module].groups for module, value in ranks.items()}


def _sum_of(parts: Sequence[tuple[Product, float]], kind: Product, steps: int, how: tuple[Any, ...]) -> Product:
    a, b = weighted_sum([part.matrices for part, _ in parts], [part.scale * weight for part, weight in parts])
    if len(parts) > 1 or steps < a.shape[1]:
        a, b = cut(a, b, steps, *how)
    dtypes = [factor.dtype for part, _ in parts for factor in (part.a, part.b)]
    widest = reduce(torch.promote_types, dtypes)  # of float16 and bfloat16 float32: neither holds the other
    return replace(kind, a=kind.a.to(widest), b=kind.b.to(widest)).with_factors(a, b, 1.0)


def check_together(read: Sequence[LoraCheckpoint]) -> None:
    """Raise ValueError for adapters of different base models, whose updates have no sum."""
    first = next((each for each in read if each.config.base_model_name_or_path), read[0])
    shapes: dict[str, tuple[str, object]] = {}  # module -> the first adapter that has it, and its shape there
    for each in read:
        base = each.config.base_model_name_or_path
        if base and base != first.config.base_model_name_or_path:
            raise ValueError(
                f"adapters: {each.name!r} is of the base model {base!r}, and {first.name!r} of "
                f"{first.config.base_model_name_or_path!r}. Their updates have no sum."
            )
        for module, product in each.products.items():
            name, kind = shapes.setdefault(module, (each.name, product.kind))
            if product.kind != kind:
                raise ValueError(
                    f"adapters: {module} is of another shape in {each.name!r} than in {name!r}: they are of "
                    "different base models."
                )
    wrapped: dict[str, tuple[str, object]] = {}  # module -> the first adapter of its parameters, and which they are
    for each in read:
        for host, found in _parameters(each).items():
            name, known = wrapped.setdefault(host, (each.name, found))
            if known != found:
                raise ValueError(
                    f"adapters: {each.name!r} and {name!r} adapt other parameters of {host}, whose tensors the files "
                    "name by their order alone. Merge adapters with the same target_parameters."
                )


def _parameters(read: LoraCheckpoint) -> dict[str, tuple[int, list[str]]]:
    """Wrapped module -> how many of its parameters are adapted, and which may be."""
    found: dict[str, list[Product]] = {}
    for module, product in read.products.items():
        if product.of_parameter:
            found.setdefault(host_of(module), []).append(product)
    return {
        host: (len(products), sorted({key for product in products for key in product.keys}))
        for host, products in found.items()
    }
