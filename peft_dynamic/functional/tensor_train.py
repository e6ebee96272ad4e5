"""Tensor trains of matrices, as LoRETTA uses them (Yang et al., NAACL 2024, arXiv 2402.11417).

Notation: an (in, out) matrix is read, row by row, as one tensor k_1 x ... x k_d with k_1 * ... * k_d = in * out. This
is not the tensor-train *matrix* form, which pairs a factor of `in` with a factor of `out`. The train has cores G_i of
shape (r_{i-1}, k_i, r_i), with r_0 = r_d = 1 and all inner ranks equal. The entry (i_1, ..., i_d) of the tensor is the
product of the matrices G_1[:, i_1, :] ... G_d[:, i_d, :].

Three ways to use it, by what they cost for n rows of input:

- `contract` builds the matrix: in * out * r multiplications, and n * in * out to apply it. The authors' code does this.
- `split` and `apply_split` stop one product earlier. Where the first cores cover exactly `in`, the matrix is a product
  of an (in, r) and an (r, out) matrix. They are applied one after the other: n * r * (in + out). A boundary inside a
  core is handled too where that core's factor can be divided there.
- core by core, without building anything: not here. The two parts hold no more than in * r and r * out numbers, so
  building them costs about as much as one row of input costs to apply.

Everything is a few matrix products, whose intermediate reshapes are views: it runs in each training step of each layer.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Integral
from typing import TypeVar

import torch

# Factors are kept at or under this unless a prime factor of the size is larger.
MAX_FACTOR = 16
# The shapes of the reference code, so that the published parameter counts come out by default: (larger, smaller) side
# of the matrix -> shape. It has one shape for a matrix and for the transposed one. Its rows for 2304 x 64 and
# 5120 x 5120 are left out, because their products are wrong; other sizes, such as 2048 and 3072, were never in it.
PUBLISHED_SHAPES: dict[tuple[int, int], tuple[int, ...]] = {
    (768, 8): (8, 8, 12, 8),
    (768, 16): (8, 16, 12, 8),
    (768, 64): (8, 8, 12, 8, 8),
    (768, 768): (8, 8, 12, 12, 8, 8),
    (1024, 8): (4, 8, 8, 8, 4),
    (1024, 16): (4, 8, 16, 8, 4),
    (1024, 64): (4, 8, 8, 8, 8, 4),
    (1024, 1024): (4, 8, 8, 16, 8, 8, 4),
    (2304, 8): (8, 8, 8, 4, 9),
    (2304, 16): (8, 8, 8, 8, 9),
    (2304, 2304): (4, 4, 8, 8, 8, 8, 9, 9),
    (4096, 8): (16, 16, 8, 4, 4),
    (4096, 16): (16, 16, 16, 4, 4),
    (4096, 64): (16, 16, 16, 4, 4, 4),
    (4096, 4096): (4, 4, 16, 16, 16, 16, 4, 4),
    (5120, 8): (8, 8, 10, 8, 8),
    (5120, 16): (8, 16, 10, 8, 8),
    (5120, 64): (5, 8, 8, 16, 8, 8),
    (8192, 8): (4, 16, 16, 16, 4),
    (8192, 16): (4, 16, 16, 16, 8),
    (8192, 64): (4, 16, 16, 16, 8, 4),
}


def factorize(in_features: int, out_features: int) -> tuple[int, ...]:
    """Shape k_1 x ... x k_d of the tensor train of an (in, out) matrix.

    The reference's shape for the sizes that it has (`PUBLISHED_SHAPES`); else computed. Both sides are factorised into
    balanced factors near 8, at most `MAX_FACTOR` unless a prime factor is larger. Where the smaller side s divides the
    larger one, the shape is factors(s), factors(larger / s), factors(s) mirrored. Then the cores can be parted between
    `in` and `out` whichever of the two comes first: `split` needs that. Larger factors go to the ends, whose cores have
    one rank of 1 and so cost least.

    Args:
        in_features: rows of the matrix, at least 1.
        out_features: columns, at least 1. The result is the same for (in, out) and (out, in).

    Returns:
        At least two factors; their product is in_features * out_features.

    Raises:
        ValueError: a size below 1.
    """
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if not _is_int(size) or size < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {size!r}.")
    small, large = sorted((int(in_features), int(out_features)))
    published = PUBLISHED_SHAPES.get((large, small))
    if published is not None:
        return published
    if large % small == 0:
        ends = _balanced_factors(small)
        shape = ends + _balanced_factors(large // small) + ends[::-1]
    else:
        shape = _balanced_factors(large) + _balanced_factors(small)[::-1]
    return shape if len(shape) > 1 else (*shape, *[1] * (2 - len(shape)))


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _prime_factors(size: int) -> list[int]:
    """Largest first."""
    primes, divisor = [], 2
    while divisor * divisor <= size:
        while size % divisor == 0:
            primes.append(divisor)
            size //= divisor
        divisor += 1
    if size > 1:
        primes.append(size)
    return primes[::-1]


def _balanced_factors(size: int) -> tuple[int, ...]:
    """Factors of `size` near 8, largest first; none for 1."""
    primes = _prime_factors(size)
    if not primes:
        return ()
    fewest = min(len(primes), max(1, round(math.log(size, 8))))
    for count in range(fewest, len(primes) + 1):
        factors = [1] * count
        for prime in primes:
            factors[factors.index(min(factors))] *= prime
        if all(factor <= MAX_FACTOR or factor in primes for factor in factors):
            break
    return tuple(sorted((factor for factor in factors if factor > 1), reverse=True))


def check_shape(shape: Sequence[int], in_features: int, out_features: int, tensor_rank: int) -> None:
    """Refuse a tensor-train shape or rank that does not fit an (in, out) matrix.

    Between cores i and i + 1 the tensor has a rank of at most min(k_1 * ... * k_i, k_{i+1} * ... * k_d). One inner rank
    serves all these places, and the published settings exceed the bound at the ends (rank 20 next to a first factor of
    8), where a part of the cores is then redundant. So only a rank above the largest of the bounds is refused: such a
    rank would be redundant everywhere.

    Args:
        shape: k_1, ..., k_d.
        in_features: rows of the matrix.
        out_features: its columns.
        tensor_rank: the inner ranks.

    Raises:
        ValueError: fewer than two factors, a factor below 1, a product other than in * out, or a rank below 1 or above
            the largest of the bounds. The message names the argument, its value, the rule and the fix.
    """
    fix = f"Pass for example {list(factorize(in_features, out_features))}, or None for an automatic shape"
    if isinstance(shape, str) or not isinstance(shape, Sequence) or len(shape) < 2 or not all(map(_is_int, shape)):
        raise ValueError(f"tensor_shape must be a list of at least two ints, got {shape!r}. {fix}.")
    if min(shape) < 1:
        raise ValueError(f"the factors of tensor_shape must be at least 1, got {list(shape)}. {fix}.")
    if math.prod(shape) != in_features * out_features:
        raise ValueError(
            f"the factors of tensor_shape must multiply to {in_features} x {out_features} = "
            f"{in_features * out_features}, got {list(shape)} with a product of {math.prod(shape)}. {fix}."
        )
    if not _is_int(tensor_rank) or tensor_rank < 1:
        raise ValueError(f"tensor_rank must be an int of at least 1, got {tensor_rank!r}.")
    largest = max(min(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape)))
    if tensor_rank > largest:
        raise ValueError(
            f"tensor_rank={tensor_rank} is above {largest}, the largest rank that a tensor of shape {list(shape)} can "
            f"have between two of its cores. Lower tensor_rank to {largest} or less, or change tensor_shape."
        )


def core_shapes(shape: Sequence[int], tensor_rank: int) -> list[tuple[int, int, int]]:
    """Shapes (r_{i-1}, k_i, r_i) of the cores, with r_0 = r_d = 1 and every other rank `tensor_rank`."""
    last = len(shape) - 1
    return [(1 if i == 0 else tensor_rank, k, 1 if i == last else tensor_rank) for i, k in enumerate(shape)]


def parameter_count(shape: Sequence[int], tensor_rank: int) -> int:
    """Numbers in all cores: r k_1 + r^2 (k_2 + ... + k_{d-1}) + r k_d."""
    return sum(math.prod(core) for core in core_shapes(shape, tensor_rank))


def init_cores(
    shape: Sequence[int],
    tensor_rank: int,
    in_features: int,
    out_features: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> list[torch.Tensor]:
    """Random cores whose matrix has entries of mean 0 and standard deviation sqrt(1 / (in + out)), Glorot's order.

    Core i is N(0, 1) * sdv^(1/d) / sqrt(r_i) with sdv that deviation: an entry is a sum over all inner indices of
    products of d numbers, so the r_i cancel the number of terms.

    Args:
        shape: k_1, ..., k_d.
        tensor_rank: the inner ranks.
        in_features: rows of the matrix.
        out_features: its columns.
        generator: of the device's kind; None for torch's default one.
        dtype: None for torch's default.
        device: None for torch's default.

    Returns:
        One tensor per core, shaped as `core_shapes` says, without requires_grad.
    """
    deviation = (in_features + out_features) ** -0.5
    each = deviation ** (1 / len(shape))
    return [
        torch.randn(core, generator=generator, dtype=dtype, device=device) * (each / math.sqrt(core[2]))
        for core in core_shapes(shape, tensor_rank)
    ]


_Count = TypeVar("_Count", bound=Callable)
_with_results: dict[Callable, Callable] = {}


def _kept(function: _Count) -> _Count:
    """The function with its results kept; as it is under torch.compile, which would warn, and needs it once."""
    if torch.compiler.is_compiling():
        return function
    if function not in _with_results:
        _with_results[function] = lru_cache(maxsize=256)(function)
    return _with_results[function]  # type: ignore[return-value]  # lru_cache keeps the signature, not the type


def _from_left(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """Contract the first cores: (k_1 * ... * k_m, r_m)."""
    left = cores[0].reshape(-1, cores[0].shape[2])
    for core in cores[1:]:
        left = (left @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[2])
    return left


def _from_right(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """Contract the last cores: (r_m, k_{m+1} * ... * k_d)."""
    right = cores[-1].reshape(cores[-1].shape[0], -1)
    for core in reversed(cores[:-1]):
        right = (core.reshape(-1, core.shape[2]) @ right).reshape(core.shape[0], -1)
    return right


def _building_cost(shapes: Sequence[tuple[int, ...]], middle: int) -> int:
    """Multiplications of `_from_left` over the first `middle` cores and `_from_right` over the others."""
    cost = 0
    rows = shapes[0][1]
    for before, k, after in shapes[1:middle]:
        cost += rows * before * k * after
        rows *= k
    columns = shapes[-1][1]
    for before, k, after in reversed(shapes[middle:-1]):
        cost += before * k * after * columns
        columns *= k
    return cost


def _cheapest_middle(shapes: tuple[tuple[int, ...], ...]) -> int:
    """Where to part the cores so that building both parts costs least; their product costs the same wherever it is."""
    return min(range(1, len(shapes)), key=lambda middle: _building_cost(shapes, middle))


def contract(cores: Sequence[torch.Tensor], in_features: int, out_features: int) -> torch.Tensor:
    """The matrix of a tensor train; differentiable.

    Both ends are contracted towards the place that needs the fewest multiplications, then multiplied.

    Args:
        cores: G_1, ..., G_d, at least two, each (r_{i-1}, k_i, r_i).
        in_features: rows of the matrix.
        out_features: its columns.

    Returns:
        (in, out), contiguous. Under autocast it has autocast's dtype.
    """
    middle = _kept(_cheapest_middle)(tuple(tuple(core.shape) for core in cores))
    return (_from_left(cores[:middle]) @ _from_right(cores[middle:])).reshape(in_features, out_features)


def _boundary(shape: tuple[int, ...], in_features: int) -> tuple[int, int] | None:
    """Where `in` ends among the cores.

    Returns:
        (n, k_a): the first n cores, the last of them only up to the leading k_a of its factor k_a * k_b, cover `in`.
        None where no such place exists, or nothing is left on one side.
    """
    rows = 1
    for n, k in enumerate(shape, start=1):
        if rows * k >= in_features:
            part = in_features // rows
            fits = rows * part == in_features and k % part == 0
            return (n, part) if fits and n < len(shape) else None
        rows *= k
    return None


def can_split(shape: Sequence[int], in_features: int) -> bool:
    """Whether `split` works for this shape: whether its factors can be divided between `in` and `out`."""
    return _boundary(tuple(shape), in_features) is not None


def split(cores: Sequence[torch.Tensor], in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two thin matrices that together are the matrix of the train, for `apply_split`; differentiable.

    Args:
        cores: G_1, ..., G_d, each (r_{i-1}, k_i, r_i), of a shape for which `can_split` holds.
        in_features: rows of the matrix.

    Returns:
        left (in, k_b * r) and right (r, out / k_b). k_b is 1 where `in` ends between two cores; then left @ right is
        the matrix. Else k_b is the part of the boundary core's factor that belongs to `out`, and the matrix is
        `(left.reshape(-1, r) @ right).reshape(in, out)`.

    Raises:
        ValueError: the shape cannot be divided there.
    """
    shape = tuple(core.shape[1] for core in cores)
    boundary = _boundary(shape, in_features)
    if boundary is None:
        raise ValueError(f"a tensor of shape {list(shape)} cannot be divided after {in_features} rows; use contract.")
    n = boundary[0]
    return _from_left(cores[:n]).reshape(in_features, -1), _from_right(cores[n:])


def apply_split(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Product x @ W, plus a bias, for the two matrices of `split`.

    Args:
        x: (..., in).
        left: (in, k_b * r).
        right: (r, out / k_b).
        bias: (out,) or None.

    Returns:
        (..., out).
    """
    inner = x @ left
    rank = right.shape[0]
    if inner.shape[-1] == rank:
        return torch.nn.functional.linear(inner, right.mT, bias)
    product = (inner.unflatten(-1, (-1, rank)) @ right).flatten(-2)
    return product if bias is None else product + bias


def _prefers_dense(tokens: int, shape: tuple[int, ...], tensor_rank: int, in_features: int, out_features: int) -> bool:
    boundary = _boundary(shape, in_features)
    if boundary is None:
        return True
    shapes = core_shapes(shape, tensor_rank)
    n, part = boundary
    inner = shape[n - 1] // part * shapes[n - 1][2]  # k_b * r
    thin = _building_cost(shapes, n) + tokens * inner * (in_features + math.prod(shape[n:]))
    middle = _cheapest_middle(tuple(shapes))
    size = in_features * out_features
    dense = _building_cost(shapes, middle) + size * shapes[middle - 1][2] + tokens * size
    return dense < thin


def prefers_dense(tokens: int, shape: Sequence[int], tensor_rank: int, in_features: int, out_features: int) -> bool:
    """Whether building the matrix and applying it takes fewer multiplications than `split` and `apply_split`.

    True as well where the shape cannot be split. For a bottleneck adapter of published size it is False at any number
    of tokens; it is True where the rank is not small beside both sides of the matrix.

    Args:
        tokens: rows of input.
        shape: k_1, ..., k_d.
        tensor_rank: the inner ranks.
        in_features: rows of the matrix.
        out_features: its columns.
    """
    return _kept(_prefers_dense)(tokens, tuple(shape), tensor_rank, in_features, out_features)


def contract_batch(x: torch.Tensor, cores: Sequence[torch.Tensor], in_features: int, out_features: int) -> torch.Tensor:
    """Product x @ W for the matrix W of a tensor train, by whichever way takes fewer multiplications; differentiable.

    Args:
        x: (..., in).
        cores: G_1, ..., G_d, at least two, each (r_{i-1}, k_i, r_i), of any shape whose product is in * out.
        in_features: rows of the matrix.
        out_features: its columns.

    Returns:
        (..., out). Without building W where `prefers_dense` is False.
    """
    shape = tuple(core.shape[1] for core in cores)
    if _kept(_prefers_dense)(x.numel() // in_features, shape, cores[0].shape[2], in_features, out_features):
        return x @ contract(cores, in_features, out_features)
    return apply_split(x, *split(cores, in_features))
