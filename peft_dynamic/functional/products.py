"""Products B A of low rank: their singular values, cuts and sums, through matrices of the size of the rank.

Equations, with A (r, in), B (out, r), s the scale of the product, and two positive semidefinite r x r matrices

    (1)  K_A = A C A^T,  K_B = B^T G B            C = G = I unless weights are given
    (2)  K_A = L L^T;  V the eigenvectors of L^T K_B L, largest first, sigma_i^2 its eigenvalues
    (3)  E = L V,  F = V^T L^-1;   (B E[:, :b]) (F[:b] A) is the best product of rank b in the norm
         |G^(1/2) (B A - X) C^(1/2)|_F, and its error is sqrt(sum_{i > b} sigma_i^2)
    (4)  sum_t w_t s_t B_t A_t = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]
    (5)  a component of layer l costs c_l and is worth (s_l sigma_{l,i})^2; components are taken in the order of worth
         over cost until the first that a budget has no room for, so that a smaller budget's are among a larger one's
    (6)  of a sum (4), with K_t = A_t C_t A_t^T known of each adapter on data of its own: K_A = mean_t A C_t A^T, where
         C_t = A_t^+ K_t (A_t^+)^T + c_t (I - A_t^+ A_t) and c_t = tr K_t / tr(A_t A_t^T)

Sources: (3) Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1, 1936, applied
to L^-1 A C^(1/2), whose rows are orthonormal; E and F are those of `functional.ranks`. (5) is the greedy rule for one
budget over all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peft_dynamic.functional.ranks import bases_of, gram_matrices

# Beside the largest, smaller singular values are rounding, as roots of it: of components that are not there.
ROUNDING = 1e-6


def grams(
    a: torch.Tensor,
    b: torch.Tensor,
    moments: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    damping: float = 0.1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K_A and K_B of equation (1), (..., r, r) float64.

    Args:
        a: (..., r, in).
        b: (..., out, r).
        moments: E[z z^T] with z = A x, and E[d d^T] / s^2 with d = dL/dz, each (..., r, r); None for C = I or G = I.
        damping: lambda of K + lambda (tr K / tr K') K', with K' that of C = G = I. Moments of few rows are near
            singular, and a cut would trust directions that they have not seen. Infinite is the plain cut.
    """
    plain = gram_matrices(a[None], b[None])
    found = []
    for own, moment in zip(plain, moments, strict=True):
        if moment is None:
            found.append(own[0])
            continue
        found.append(damped(own[0], moment, damping))
    return found[0], found[1]


def damped(plain: torch.Tensor, moment: torch.Tensor, damping: float) -> torch.Tensor:
    """K + lambda (tr K / tr K') K', in float64.

    Args:
        plain: K', that of C = G = I, (..., r, r).
        moment: K, of the same shape.
        damping: lambda.
    """
    wide, plain = moment.double(), plain.double()
    share = _traces(wide) / _traces(plain).clamp(min=1e-300)
    return wide + damping * share * plain


def _traces(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def spectrum(gram_a: torch.Tensor, gram_b: torch.Tensor) -> torch.Tensor:
    """Sigma of equation (2), (..., r), largest first, from K_A and K_B, (..., r, r) float64."""
    values, vectors = torch.linalg.eigh(gram_a)
    # through the eigenvectors, not Cholesky's factor: rows of A may be dependent, or 0
    left = vectors * values.clamp(min=0).sqrt()[..., None, :]
    sigma = torch.linalg.eigvalsh(left.mT @ gram_b @ left).flip(-1).clamp(min=0).sqrt()
    return torch.where(sigma > ROUNDING * sigma[..., :1], sigma, 0.0)


def singular_values(a: torch.Tensor, b: torch.Tensor, *moments: Any) -> torch.Tensor:
    """The singular values of the product B A, in the norm of equation (3): sigma of equation (2).

    Args:
        a: (..., r, in), a product or several at once.
        b: (..., out, r).
        moments: further arguments of `grams`.

    Returns:
        (..., r) float64, largest first.
    """
    return spectrum(*grams(a, b, *moments))


def cut(a: torch.Tensor, b: torch.Tensor, rank: int, *moments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the best product of this rank: equation (3).

    Args:
        a: (..., r, in), a product or several at once.
        b: (..., out, r).
        rank: from 1 to r.
        moments: further arguments of `grams`.

    Returns:
        (..., rank, in) and (..., out, rank), in the dtypes of the factors; computed in float64.
    """
    gram_a, gram_b = grams(a, b, *moments)
    e, f = bases_of(gram_a[None], gram_b[None])
    return (f[0, ..., :rank, :] @ a.double()).to(a.dtype), (b.double() @ e[0, ..., :rank]).to(b.dtype)


def weighted_sum(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a weighted sum of products: equation (4), of the sum of the ranks, exactly.

    Args:
        factors: (A_t, B_t), each (..., r_t, in) and (..., out, r_t).
        weights: w_t s_t.

    Returns:
        (..., sum r_t, in) and (..., out, sum r_t), float64.
    """
    a = torch.cat([each.double() for each, _ in factors], dim=-2)
    b = torch.cat([each.double() * weight for (_, each), weight in zip(factors, weights, strict=True)], dim=-1)
    return a, b


def pooled(factors: Sequence[torch.Tensor], moments: Sequence[torch.Tensor]) -> torch.Tensor:
    """K_A of a sum of products, from moments that each adapter has of its own data: equation (6).

    Adapter t's moments K_t tell its data's covariance C_t in the directions of its own rows. In all others, in which
    the other adapters may read, we take it as c_t I: that is our approximation. It is exact where the rows of all A_t
    span the same space, and for one adapter. Rows that several adapters share count once, as in A C A^T.

    Args:
        factors: A_t, each (r_t, in).
        moments: K_t = E[z z^T] with z = A_t x, each (r_t, r_t).

    Returns:
        (sum r_t, sum r_t) float64.
    """
    stack = torch.cat([a.double() for a in factors])
    gram, total, first = stack @ stack.mT, torch.zeros(()), 0
    for moment in moments:
        own = slice(first, first + len(moment))
        first += len(moment)
        wide = moment.double().to(gram.device)
        onto = gram[:, own] @ torch.linalg.pinv(gram[own, own], rtol=1e-12, hermitian=True)  # A A_t^+
        level = wide.trace() / gram[own, own].trace().clamp(min=1e-300)
        total = total + onto @ wide @ onto.mT + level * (gram - onto @ gram[own])
    return total / len(moments)


def allocate(values: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """How many components each layer gets of one budget: equation (5).

    Args:
        values: layer -> s sigma_i, largest first.
        costs: layer -> what a component costs.
        budget: what all together may cost.

    Returns:
        layer -> rank, 0 among them.
    """
    items = [
        (-(value**2) / costs[layer], layer, number)
        for layer, row in values.items()
        for number, value in enumerate(row)
        if value > 0
    ]
    ranks = dict.fromkeys(values, 0)
    for _, layer, _ in sorted(items, key=lambda item: (item[0], item[2], item[1])):
        budget -= costs[layer]
        if budget < 0:
            break
        ranks[layer] += 1
    return ranks


def nothing_left(
    values: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int | float, name: str
) -> str:
    """What to say where `allocate` gives no layer a component.

    Args:
        values: as there.
        costs: as there.
        budget: as it was given.
        name: of the argument.
    """
    if not any(value > 0 for row in values.values() for value in row):
        return (
            f"{name}={budget}: all updates of the adapter are zero, as before training, where B is zero: there is "
            "nothing to share the budget among. Train the adapter first, or load a trained one."
        )
    least = min(costs.values())
    share = ", or a share as a float up to 1.0" if name == "parameters" else ""
    return f"{name}={budget}: no module would be left; a component takes {least} or more. Pass a larger count{share}."
