"""Truncation, scale rules and rank sampling of DyLoRA (Valipour et al., EACL 2023, arXiv 2210.07558).

Notation: A is (r, in) and B is (out, r). At rank b the update is `scale(b) * (B @ E[:, :b]) @ (F[:b] @ A)` with E and F
of `leading_components` under truncation="svd", and `scale(b) * B[:, :b] @ A[:b]` under truncation="prefix" (the paper).
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

# The `lora_alpha` that a stock LoRA of rank b needs for DyLoRA's scale at rank b: that scale is alpha_at(b) / b. Kept
# in this form so that a rank-b layer *is* a stock LoRA layer, also in PEFT's own arithmetic and after an export.
SCALING_RULES: dict[str, Callable[[float, int, int], float]] = {
    "alpha/b": lambda alpha, rank, max_rank: alpha,  # the paper's, eq. 7
    "alpha/r": lambda alpha, rank, max_rank: alpha * rank / max_rank,  # one scale for all ranks
    "alpha/sqrt(b)": lambda alpha, rank, max_rank: alpha * math.sqrt(rank),  # rank-stabilised, as rsLoRA at each b
    "alpha/sqrt(r*b)": lambda alpha, rank, max_rank: alpha * math.sqrt(rank / max_rank),  # halfway of the first two
}


def alpha_at(rule: str, lora_alpha: float, rank: int, max_rank: int) -> float:
    """`lora_alpha` of the stock LoRA that equals DyLoRA at `rank`; its scale is the result divided by `rank`.

    Args:
        rule: a key of `SCALING_RULES`.
        lora_alpha: the configured alpha.
        rank: b, from 1 to `max_rank`.
        max_rank: r of this layer.
    """
    return SCALING_RULES[rule](lora_alpha, rank, max_rank)


def slice_rank(
    weight: torch.Tensor, dim: int, rank: int, max_rank: int, groups: tuple[int, int] = (1, 1), frozen_below: int = 0
) -> torch.Tensor:
    """The first `rank` components of a LoRA factor, the cut of truncation="prefix".

    Args:
        weight: a factor whose `dim` has `outer * max_rank * inner` entries.
        dim: where the rank lies: 0 for A, 1 for B.
        rank: components to keep, from 1 to `max_rank`.
        max_rank: components in all.
        groups: (outer, inner): how many ranks' worth of entries lie around the rank inside `dim`. PEFT stores the
            experts of a 3-D parameter as (experts, r) in A and as (r, experts) in B, a grouped convolution's A as
            (groups, r / groups); everything else is (1, 1).
        frozen_below: components before this one get no gradient (DyLoRA's FROZEN update).

    Returns:
        `weight` itself at full rank with nothing frozen, else a view where the layout allows one.
    """
    if rank == max_rank and not frozen_below:
        return weight
    outer, inner = groups
    grouped = outer > 1 or inner > 1
    if grouped:
        weight, dim = weight.unflatten(dim, (outer, max_rank, inner)), dim + 1
    if frozen_below:
        # Not a mask on the gradient: a sum of a detached and a live part has no gradient for the first by construction.
        frozen = min(frozen_below, rank)
        kept, moving = weight.narrow(dim, 0, frozen).detach(), weight.narrow(dim, frozen, rank - frozen)
        weight = torch.cat([kept, moving], dim)
    else:
        weight = weight.narrow(dim, 0, rank)
    return weight.flatten(dim - 1, dim + 1) if grouped else weight


def usual_ranks(most: int) -> list[int]:
    """The powers of two below a rank, and that rank."""
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def rank_weights(ranks: Sequence[int], sampling: str | Sequence[float], geometric_p: float) -> tuple[float, ...]:
    """Probability of each rank.

    Args:
        ranks: increasing.
        sampling: "full" (the largest alone), "mostly_full" (3/4 for it, the rest shared equally), "uniform",
            "geometric" (over the places
            i in the list, p (1 - p)^i, normalised), or a weight for each rank.
        geometric_p: p.
    """
    if sampling == "uniform":
        weights = [1.0] * len(ranks)
    elif sampling == "full":
        weights = [0.0] * (len(ranks) - 1) + [1.0]
    elif sampling == "mostly_full":
        lower = len(ranks) - 1
        weights = [0.25 / lower] * lower + [0.75] if lower else [1.0]
    elif sampling == "geometric":
        weights = [geometric_p * (1 - geometric_p) ** i for i in range(len(ranks))]
    else:
        weights = [float(weight) for weight in sampling]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


@lru_cache(maxsize=64)
def draw_rank(ranks: tuple[int, ...], weights: tuple[float, ...], seed: int, step: int) -> int:
    """The rank of optimizer step `step`: a pure function, so that processes, retries and resumed runs agree on it.

    Each rank has the probability that `weights` gives it, but the steps are not independent. Let n be the least number
    of steps in which one lower rank is to be expected. Then of each n steps in turn at least one has a lower rank. So
    every window of 2 / (1 - p) steps has one, p the probability of the largest, and a short run has its share.

    Args:
        ranks: increasing.
        weights: the probability of each.
        seed: of the draws.
        step: the number of the optimizer step, from 0.
    """
    below = sum(weights[:-1])
    rng = random.Random(f"{seed}/{step}")
    if below > 0 and _is_below(below, seed, step, rng):
        return rng.choices(ranks[:-1], weights[:-1])[0]
    return ranks[-1]


def _is_below(probability: float, seed: int, step: int, rng: random.Random) -> bool:
    """Whether a step is below the largest rank: one of each block for sure, the others with what is then left over."""
    size = math.ceil(1 / probability - 1e-9)
    block, place = divmod(step, size)
    if size == 1 or place == random.Random(f"{seed}/block {block}").randrange(size):
        return True
    return rng.random() < (probability * size - 1) / (size - 1)


def leading_components(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Constants E and F that turn the factors into those of the best low-rank approximations of their product.

    For every rank k, `(B E[:, :k]) (F[:k] A)` is the product B A cut to its k leading singular components (Eckart and
    Young). They live in the r-dimensional space between the factors, so this costs r x r problems and no decomposition
    of B A.

    Args:
        a: (n, r, in), n products at once.
        b: (n, out, r).

    Returns:
        E and F, each (n, r, r), without gradient, in float32, or float64 for such factors. Where A has dependent rows
        the last rows of F are 0.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    e, f = bases_of(*gram_matrices(a, b))
    return e.to(dtype), f.to(dtype)


def leading_part(
    matrices: torch.Tensor,
    dim: int,
    rank: int,
    basis: tuple[torch.Tensor, torch.Tensor],
    mixer: torch.Tensor | None = None,
) -> torch.Tensor:
    """One factor of the leading components: F[:rank] A, or F[:rank] M A with a mixer; or B E[:, :rank].

    Args:
        matrices: A as (n, r, in) for dim 0, B as (n, out, r) for dim 1.
        dim: where the rank lies, 0 or 1.
        rank: components to keep.
        basis: E and F of `leading_components`; the result has their dtype.
        mixer: (n, r, r) or None; of A alone.

    Returns:
        (n, rank, in) or (n, out, rank).
    """
    e, f = basis
    matrices = matrices.to(e.dtype)
    if dim == 1:
        return matrices @ e[:, :, :rank]
    leading = f[:, :rank] if mixer is None else f[:, :rank] @ mixer.to(f)
    return leading @ matrices


def gram_matrices(
    a: torch.Tensor, b: torch.Tensor, mixer: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A A^T (M A A^T M^T with a mixer M) and B^T B, all that `bases_of` needs of the factors.

    Args:
        a: (n, r, in).
        b: (n, out, r).
        mixer: (n, r, r) or None.

    Returns:
        Two tensors (n, r, r), without gradient, in float64: they square the condition number.
    """
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        wide_a, wide_b = a.detach().double(), b.detach().double()
        gram_a = wide_a @ wide_a.mT
        if mixer is not None:
            m = mixer.detach().double()
            gram_a = m @ gram_a @ m.mT
        return gram_a, wide_b.mT @ wide_b


def bases_of(gram_a: torch.Tensor, gram_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E and F of `leading_components` from the Gram matrices of the factors.

    With A A^T = L L^T and the eigenvectors V of L^T (B^T B) L, largest first: E = L V, F = V^T L^-1. L is Cholesky's
    factor; where A's rows are dependent, or nearly so, it is made from the eigenvectors of A A^T instead, with the
    inverse on their span.

    Args:
        gram_a: A A^T, (n, r, r), float64.
        gram_b: B^T B, (n, r, r), float64.
    """
    with torch.no_grad(), torch.autocast(gram_a.device.type, enabled=False):
        left, failed = torch.linalg.cholesky_ex(gram_a)
        diagonal = left.diagonal(dim1=-2, dim2=-1)
        dependent = (failed != 0) | (diagonal.amin(-1) < 1e-5 * diagonal.amax(-1))
        if dependent.any():
            return _bases_of_dependent(gram_a, gram_b)
        _, order = torch.linalg.eigh(left.mT @ gram_b @ left)
        order = order.flip(-1)
        return left @ order, torch.linalg.solve_triangular(left, order.mT, upper=False, left=False)


def _bases_of_dependent(gram_a: torch.Tensor, gram_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(gram_a)
    kept = values > values[..., -1:] * 1e-12
    root = torch.where(kept, values, 0).sqrt()
    inverse = torch.where(kept, 1 / root.clamp(min=1e-300), 0)
    left = vectors * root[..., None, :]
    _, order = torch.linalg.eigh(left.mT @ gram_b @ left)
    order = order.flip(-1)
    return left @ order, order.mT @ (inverse[..., :, None] * vectors.mT)
