"""How far a student's inner states are from its teacher's, one number per row of a batch, without its padding.

With h_S, h_T the states of the tokens t of a row after two layers, n tokens that are there, and the width D:

    (1)  hidden     1/n sum_t sum_d (h_Std - h_Ttd)^2 / D
    (2)  cosine     1/n sum_t (1 - cos(h_St, h_Tt))

With X one of the queries, keys and values of an attention, cut into A heads of the width d, whatever heads the
attention itself has, each token's row of

    (3)  R = softmax(X X^T / sqrt(d))

says how it relates to the others. Relations compare models of different widths and numbers of heads, as A has only to
divide both widths:

    (4)  relations  1/(A n) sum_heads sum_t KL(R_T[t] || R_S[t])

Padding is no key and no row. A causal model's token relates to itself and the tokens before it.

Source: W. Wang, H. Bao, S. Huang, L. Dong, F. Wei: MiniLMv2, Findings of ACL 2021, arXiv 2012.15828, for (3) and (4).
"""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity


def hidden(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Equation (1).

    Args:
        student: (B, T, D).
        teacher: (B, T, D).
        mask: (B, T) bool, the tokens that are there.

    Returns:
        (B,); 0 of a row without tokens.
    """
    return _mean((student - teacher).square().mean(-1), mask)


def cosine(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Equation (2); shapes as of `hidden`."""
    return _mean(1 - cosine_similarity(student, teacher, dim=-1), mask)


def relations(
    student: torch.Tensor, teacher: torch.Tensor, heads: int, mask: torch.Tensor, causal: bool = False
) -> torch.Tensor:
    """Equation (4), of queries, keys or values.

    Args:
        student: (B, T, D).
        teacher: (B, T, D'), of the same tokens.
        heads: A, which divides D and D'.
        mask: (B, T) bool, the tokens that are there.
        causal: whether a token sees those before it alone.

    Returns:
        (B,); 0 of a row without tokens.
    """
    length = mask.shape[1]
    seen = mask[:, None, :].expand(-1, length, -1)
    if causal:
        seen = seen.tril()
    seen = seen | torch.eye(length, dtype=torch.bool, device=mask.device)  # no row without a key, and so no nan
    p, q = (_relation(each, heads, seen) for each in (teacher, student))
    each = torch.where(seen[:, None], p.exp() * (p - q), 0.0).sum(-1).mean(1)
    return _mean(each, mask)


def _relation(x: torch.Tensor, heads: int, seen: torch.Tensor) -> torch.Tensor:
    """(B, A, T, T) log R; where a key is not seen, a number that is not used."""
    parts = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = parts @ parts.mT / parts.shape[-1] ** 0.5
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return wide.masked_fill(~seen[:, None], torch.finfo(wide.dtype).min).log_softmax(-1)


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)
