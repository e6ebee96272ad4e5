"""ScaLearn's scales over finished LoRA adapters: the sum as one product, whose B is scaled by columns.

Equations, with A_t (r_t, in), B_t (out, r_t) and s_t of source t, and omega_t in R^out, or a number

    (1)  y += sum_t omega_t (*) s_t B_t A_t x            no softmax, and no sum to one
    (2)  A = [A_1; ...; A_T],  B = [s_1 B_1, ..., s_T B_T],  B' = [diag(omega_1) s_1 B_1, ..., diag(omega_T) s_T B_T],
         so that (1) is y += B' A x, an update of rank sum_t r_t
    (3)  omega_t ~ N(omega_init / T, 0.001^2) at the start

Source: M. Frohmann, C. Holtermann, S. Masoudian, A. Lauscher, N. Rekabsaz: ScaLearn: Simple and Highly
Parameter-Efficient Task Transfer by Learning to Scale, Findings of ACL 2024, arXiv 2310.01217, equation 6; the authors'
code CPJKU/ScaLearn. Theirs scales the outputs of non-linear adapters, which fold into nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SPREAD = 0.001  # the standard deviation of the start


def start_of_scales(sources: int, width: int, mean: float) -> torch.Tensor:
    """Omega at the start, by equation (3): (sources, width) float32, drawn from torch's generator.

    Args:
        sources: how many there are.
        width: out, or 1 for one number a source.
        mean: omega_init / T.
    """
    return mean + SPREAD * torch.randn(sources, width)


def scale_columns(b: torch.Tensor, omega: torch.Tensor, ranks: Sequence[int], experts: int = 1) -> torch.Tensor:
    """B' of equation (2), from B.

    Args:
        b: (out, r, ...) with r the sum of `ranks`; of n experts (out, r n), experts last.
        omega: (T, out) or (T, 1), a row for each of `ranks`.
        ranks: r_t of each source, in the order of B's columns.
        experts: n.

    Returns:
        Of B's shape and dtype.
    """
    rows = torch.cat([row.expand(rank, -1) for row, rank in zip(omega.to(b), ranks, strict=True)])  # (r, out or 1)
    columns = rows.mT if experts == 1 else rows.mT.repeat_interleave(experts, dim=1)
    return b * columns.reshape(*columns.shape, *[1] * (b.dim() - 2))
