"""The next-token losses of several exits that share one head, without holding their logits.

With h_ei the state of exit e at labelled position i, after the final norm, W and b the head, s a scale, c a soft cap:

    (1)  z_ei = s (W h_ei + b)                         and, with a soft cap, z_ei <- c tanh(z_ei / c)
    (2)  l_ei = logsumexp(z_ei) - z_ei[y_i]
    (3)  L    = sum_e w_e sum_i l_ei

Notable: the gradients are computed in the forward pass, chunk by chunk, while the chunk's logits are there; the
backward pass only scales them. Ignored positions are dropped first. So what is alive at any time is one chunk of
logits, one gradient of the head and the gradients of the states, however many exits there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

IGNORED = -100
CHUNK = 2**25  # logits alive at a time: 682 positions of a vocabulary of 49152


class ExitLosses(NamedTuple):
    """What the exits lose on a batch.

    Attributes:
        loss: () equation (3), with gradients.
        nll: (E,) float32, the sums over positions of equation (2), without gradients.
        correct: (E,) float32, at how many positions no token is likelier than the label.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    correct: torch.Tensor


def exit_losses(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    exit_weights: Sequence[float] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> ExitLosses:
    """The summed next-token losses of E exits: equations (1) to (3).

    The products are computed in autocast's type where it is on, else in `hidden`'s; in float32 in place of float16,
    where small probabilities would be lost. All else, and the head's gradient over the chunks, is float32.

    Args:
        hidden: (E, N, D) states after the final norm.
        labels: (N,) int64, the token that each position should say; -100 to ignore it.
        weight: (V, D) of the head.
        bias: (V,) of the head, or None.
        exit_weights: w_e, E numbers; None for 1.
        logit_scale: s.
        softcap: c > 0, or None for none.
        chunk: positions at a time; None for as many as make `CHUNK` logits.

    Returns:
        The losses. Without labelled positions they are 0, and so are the gradients.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(hidden, labels, weight, exit_weights, softcap)
    exits = len(hidden)
    keep = labels != IGNORED
    labels = labels[keep]
    rows = hidden[:, keep].reshape(-1, hidden.shape[-1])
    each = [1.0] * exits if exit_weights is None else list(exit_weights)
    factors = torch.tensor(each, dtype=torch.float32, device=rows.device)
    loss, nll, correct = _ExitLosses.apply(
        rows,
        weight,
        bias,
        labels.repeat(exits),
        factors.repeat_interleave(len(labels)),
        logit_scale,
        softcap,
        max(1, CHUNK // weight.shape[0]) if chunk is None else chunk,
        torch.is_grad_enabled(),
    )
    return ExitLosses(loss, nll.view(exits, -1).sum(1), correct.view(exits, -1).sum(1))


def exit_losses_reference(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    exit_weights: Sequence[float] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> ExitLosses:
    """What `exit_losses` computes, by torch's own operations with all logits alive; for tests."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    keep = labels != IGNORED
    logits, labels = logits[:, keep], labels[keep]
    chosen = logits.gather(2, labels.expand(len(hidden), -1)[..., None]).squeeze(2)
    each = torch.logsumexp(logits, -1) - chosen
    factors = [1.0] * len(hidden) if exit_weights is None else exit_weights
    correct = (chosen >= logits.amax(-1)).sum(1).float() if len(labels) else each.detach().sum(1)
    return ExitLosses((each.sum(1) * each.new_tensor(factors)).sum(), each.detach().sum(1), correct)


class _ExitLosses(torch.autograd.Function):
    """Equation (3) over rows: (R, D) states, (R,) labels and weights."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        factors: torch.Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
        grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        dtype = torch.float32 if dtype == torch.float16 else dtype
        need_rows, need_weight, need_bias = (grad and need for need in ctx.needs_input_grad[:3])
        with torch.autocast(kind, enabled=False):
            count, vocabulary = len(rows), len(weight)
            cast = weight.to(dtype)
            pieces = max(1, -(-count // chunk))  # of equal size: a small last piece would cost as much as a large one
            size = -(-count // pieces)
            wide = torch.promote_types(dtype, torch.float32)
            raw = rows.new_empty(size, vocabulary, dtype=dtype)
            work = raw if dtype == wide else rows.new_empty(size, vocabulary, dtype=wide)
            nll, correct = rows.new_zeros(count, dtype=wide), rows.new_zeros(count, dtype=torch.float32)
            d_rows = torch.zeros_like(rows) if need_rows else None
            d_weight = torch.zeros(weight.shape, dtype=wide, device=rows.device) if need_weight else None
            d_bias = torch.zeros(vocabulary, dtype=wide, device=rows.device) if need_bias else None
            product = cast.new_empty(cast.shape) if need_weight and dtype != wide else None
            for start in range(0, count, max(1, size)):
                part = slice(start, min(start + size, count))
                h, y, w = rows[part].to(dtype), labels[part, None], factors[part, None].to(wide)
                z = torch.mm(h, cast.t(), out=raw[: len(h)])
                if bias is not None:
                    z += bias.to(dtype)
                x = z if dtype == wide else work[: len(h)].copy_(z)
                slope = _scale_and_cap(x, scale, softcap)
                chosen, top = x.gather(1, y), x.amax(1, keepdim=True)
                total = x.sub_(top).exp_().sum(1, keepdim=True)
                nll[part] = (top + total.log() - chosen).squeeze(1)
                correct[part] = (chosen >= top).squeeze(1).float()
                if not (need_rows or need_weight or need_bias):
                    continue
                # d L / d (W h + b), in place of the logits
                x.mul_(w / total).scatter_add_(1, y, -w)
                if slope is not None:
                    x.mul_(slope)
                if scale != 1.0:
                    x.mul_(scale)
                if d_bias is not None:
                    d_bias += x.sum(0)
                d = x if dtype == wide else z.copy_(x)
                if d_rows is not None:
                    d_rows[part] = torch.mm(d, cast)
                if d_weight is not None and product is None:
                    d_weight.addmm_(d.t(), h)
                elif d_weight is not None:
                    d_weight += torch.mm(d.t(), h, out=product)
        ctx.gradients = d_rows, d_weight, d_bias
        ctx.types = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll, correct)
        return (nll * factors).sum(), nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the exit losses keep their gradients for one backward pass; run the forward pass again."
            )
        (d_rows, d_weight, d_bias), ctx.gradients = ctx.gradients, None
        weight_type, bias_type = ctx.types
        # In place: a second gradient of the head would be the largest tensor of the step.
        d_rows = None if d_rows is None else d_rows.mul_(grad.to(d_rows.dtype))
        d_weight = None if d_weight is None else d_weight.mul_(grad).to(weight_type)
        d_bias = None if d_bias is None else d_bias.mul_(grad).to(bias_type)
        return d_rows, d_weight, d_bias, None, None, None, None, None, None


def _scale_and_cap(x: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor | None:
    """Equation (1) in place; returns the soft cap's derivative."""
    if scale != 1.0:
        x.mul_(scale)
    if softcap is None:
        return None
    x.div_(softcap).tanh_()
    slope = 1 - x * x
    x.mul_(softcap)
    return slope


def _check(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    exit_weights: Sequence[float] | None,
    softcap: float | None,
) -> None:
    if (
        hidden.dim() != 3
        or labels.shape != hidden.shape[1:2]
        or weight.dim() != 2
        or weight.shape[1] != hidden.shape[2]
    ):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}, weight {tuple(weight.shape)}: must be "
            "(exits, positions, D), (positions,) and (V, D)."
        )
    if exit_weights is not None and len(exit_weights) != len(hidden):
        raise ValueError(f"exit_weights={list(exit_weights)}: must have one number for each of {len(hidden)} exits.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap}: must be positive, or None for no soft cap.")
