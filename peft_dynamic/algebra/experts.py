"""Which tensors of a file are those of `target_parameters`, and how many experts they have.

PEFT wraps a module once for each parameter of it that is targeted, and calls the inner wrappers `base_layer`. Which
wrapper has which parameter is the order in the module, which no file tells. `rank_pattern` goes by the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, permutations

_MOST = 5040  # orders of the parameters of one module


@dataclass(frozen=True)
class Place:
    """One wrapper: the rank of each expert, its number of experts, and the parameters that it may have."""

    rank: int
    experts: int
    keys: tuple[str, ...]


def host_of(module: str) -> str:
    """The wrapped module's own name."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


def candidates(host: str, targets: Iterable[str]) -> list[str]:
    """The parameters of a module that `target_parameters` may mean, as PEFT looks them up."""
    keys = {f"{host}.{target.rpartition('.')[2]}": target for target in sorted(targets)}
    return sorted(key for key in keys if any(key == target or key.endswith(f".{target}") for target in targets))


def places(rows: Mapping[str, int], keys: list[str], settings: Callable[[str], tuple[int, float]]) -> dict[str, Place]:
    """What each wrapper of one module is.

    Args:
        rows: wrapper -> the rows of its A.
        keys: the parameters that they may have.
        settings: parameter -> (rank, alpha) by the configuration.

    Raises:
        ValueError: the rows fit no number of experts, or orders of the parameters that differ in a rank or alpha.
    """
    known = {key: settings(key) for key in keys}
    if min(rank for rank, _ in known.values()) < 1:
        raise ValueError(f"the configuration has a rank below 1, in {known}")
    if len(set(known.values())) == 1:
        rank = known[keys[0]][0]
        if len(keys) < len(rows) or any(count % rank for count in rows.values()):
            raise ValueError(f"its rows {[*rows.values()]} are no experts times rank {rank}")
        return {wrapper: Place(rank, count // rank, tuple(keys)) for wrapper, count in rows.items()}
    return _told_apart(rows, known)


def _told_apart(rows: Mapping[str, int], known: Mapping[str, tuple[int, float]]) -> dict[str, Place]:
    """The same, for ranks or alphas that differ: all parameters of one module have equally many experts."""
    orders = [*islice(permutations(known, len(rows)), _MOST + 1)]
    fitting = []
    for order in orders:
        counts = {count / known[key][0] for count, key in zip(rows.values(), order, strict=True)}
        if len(counts) == 1 and all(count >= 1 and count % 1 == 0 for count in counts):
            fitting.append(order)
    may = {wrapper: tuple(sorted({order[i] for order in fitting})) for i, wrapper in enumerate(rows)}
    alike = all(len({known[key] for key in keys}) == 1 for keys in may.values())
    apart = sum(map(len, set(may.values()))) == len(set().union(*may.values()))
    if not fitting or len(orders) > _MOST or not alike or not apart:
        raise ValueError(f"the file does not tell which of {[*known]} is which, and their ranks or alphas differ")
    return {
        wrapper: Place(known[keys[0]][0], rows[wrapper] // known[keys[0]][0], keys) for wrapper, keys in may.items()
    }
