"""Activation density: a smooth count of the non-zero activations, its gradient, and the exact counts.

Equations, with a an activation, F the neurons of a layer, T_b the real tokens of sample b, and B the samples that have
any:

    (1)  s(a) = a^2 / (a^2 + eps)                      rational, the authors' code
    (2)  s(a) = tanh(|a| / sqrt(eps))                  tanh
    (3)  s(a) = min(1, |a| / sqrt(eps))                hinge
    (4)  d_l  = 1/B sum_b 1/T_b sum_{t in b} 1/F sum_f s(a_btf)
    (5)  D    = sum_stacks 1/L sum_l w_l d_l           L layers of the stack: one stack, or encoder and decoder

Notable: the mean in (4) goes over samples last, as in the authors' code. So the mean over equal parts of a batch, be
they steps of gradient accumulation or processes, is the whole batch's value, whatever the lengths of its samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

SURROGATES = ("rational", "tanh", "hinge")


def surrogate(a: torch.Tensor, eps: float = 1e-7, kind: str = "rational") -> torch.Tensor:
    """The smooth stand-in for "a is not 0": equations (1) to (3), at least in float32.

    All three are 0 at 0, go to 1, and share a width of sqrt(eps): there the rational one is 1/2.

    Args:
        a: activations, any shape.
        eps: positive; the square of the width.
        kind: one of `SURROGATES`.

    Returns:
        s(a), of a's shape, float32 or float64.
    """
    a = _wide(a)
    if kind == "rational":
        square = a * a
        return square / (square + eps)
    if kind == "tanh":
        return torch.tanh(a.abs() / eps**0.5)
    if kind == "hinge":
        return (a.abs() / eps**0.5).clamp(max=1.0)
    raise ValueError(f"surrogate must be one of {SURROGATES}, got {kind!r}.")


@torch.no_grad()
def surrogate_gradient(
    a: torch.Tensor, eps: float = 1e-7, kind: str = "rational", out: torch.Tensor | None = None
) -> torch.Tensor:
    """ds/da of `surrogate`, at least in float32; 0 at the kinks of tanh (a = 0) and hinge (a = 0 and beyond the width).

    The rational one is 2 a eps / (a^2 + eps)^2: largest at |a| = sqrt(eps / 3), and 2 eps / |a|^3 far out. It is
    computed as 2 a / ((a^2 + eps) / sqrt(eps))^2, which needs one division and squares nothing that is below eps.

    Args:
        a: activations, any shape.
        eps: as in `surrogate`.
        kind: as in `surrogate`.
        out: where to write the result, of a's shape and the result's dtype; None for a new tensor.
    """
    a, width = _wide(a), eps**0.5
    if kind == "rational":
        total = torch.addcmul(a.new_full((), width), a, a, value=1 / width, out=out).square_()
        return torch.addcdiv(a.new_zeros(()), a, total, value=2, out=total)
    if kind == "tanh":
        return torch.mul(a.sign(), (1 - torch.tanh(a.abs() / width) ** 2) / width, out=out)
    if kind == "hinge":
        return torch.mul(a.sign(), (a.abs() < width) / width, out=out)
    raise ValueError(f"surrogate must be one of {SURROGATES}, got {kind!r}.")


def token_weights(mask: torch.Tensor) -> torch.Tensor:
    """The weight of each token in equation (4): 1 / (B T_b) for a real token, 0 for padding.

    Args:
        mask: (batch, tokens), 0 or False at padding.

    Returns:
        (batch, tokens) float32; sums to 1, or to 0 where there is no real token at all.
    """
    real = (mask != 0).float()
    lengths = real.sum(dim=1, keepdim=True)
    samples = (lengths > 0).sum().clamp(min=1)
    return real / lengths.clamp(min=1) / samples


class _Density(torch.autograd.Function):
    """Equation (4) as one node, so that autograd keeps one tensor and none of the intermediate ones."""

    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        weights: torch.Tensor | None,
        eps: float,
        kind: str,
        source: torch.Tensor | None,
        remake: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        # With what is kept goes how to read it: checkpointing may replace both by those of another forward pass.
        ctx.save_for_backward(a if source is None else source, torch.tensor(remake is not None, device="cpu"))
        ctx.weights, ctx.eps, ctx.kind, ctx.remake = weights, eps, kind, remake
        ctx.shape, ctx.dtype = a.shape, a.dtype
        parts = _parts(a)
        scratch = torch.empty_like(parts[0], dtype=_wide(a[:0]).dtype)
        rows = torch.cat([_row_means(part, eps, kind, scratch[: len(part)]) for part in parts])
        return rows.mean() if weights is None else (rows * weights.flatten()).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # grad: ()
        saved, remade = ctx.saved_tensors
        remake = ctx.remake if remade else None
        gradient = torch.empty(ctx.shape, dtype=ctx.dtype, device=saved.device)
        scale = grad / gradient.numel() if ctx.weights is None else (ctx.weights * (grad / ctx.shape[-1])).view(-1, 1)
        first = 0
        for kept, into in zip(_parts(saved), _parts(gradient), strict=True):
            part = kept if remake is None else remake(kept)
            values = surrogate_gradient(part, ctx.eps, ctx.kind, into if into.dtype == _wide(part[:0]).dtype else None)
            values.mul_(scale if ctx.weights is None else scale[first : first + len(part)])
            if values is not into:
                into.copy_(values)
            first += len(part)
        return gradient, None, None, None, None, None


def layer_density(
    a: torch.Tensor,
    weights: torch.Tensor | None = None,
    eps: float = 1e-7,
    kind: str = "rational",
    source: torch.Tensor | None = None,
    remake: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """d_l of equation (4), differentiable once with respect to `a`.

    Args:
        a: (batch, tokens, neurons), or with `weights=None` any shape.
        weights: (batch, tokens) from `token_weights`; None for the plain mean.
        eps: as in `surrogate`.
        kind: as in `surrogate`.
        source: what autograd keeps instead of `a`, e.g. the activation's input, which its own backward keeps anyway.
        remake: makes rows of `a`, (rows, neurons), from those of `source` for the backward pass, without gradients;
            None where `source` is `a` in another shape.

    Returns:
        () float32, or float64 for a float64 `a`.
    """
    if weights is not None:
        weights = weights.to(device=a.device, dtype=_wide(a[:0]).dtype)
    if source is not None:
        source = source.detach()
    return _Density.apply(a, weights, float(eps), kind, source, remake)


def combine(
    densities: Sequence[torch.Tensor], weights: Sequence[float] | None = None, stacks: Sequence[str] | None = None
) -> torch.Tensor:
    """D of equation (5).

    Args:
        densities: d_l of each layer, ().
        weights: w_l of each layer; None for 1.
        stacks: the stack of each layer, e.g. "encoder" or "decoder"; None for one stack.

    Returns:
        ().
    """
    names = list(stacks) if stacks is not None else [""] * len(densities)
    factors = list(weights) if weights is not None else [1.0] * len(densities)
    layers = {name: names.count(name) for name in names}
    total = sum(
        factor / layers[name] * value for value, factor, name in zip(densities, factors, names, strict=True) if factor
    )
    return total if isinstance(total, torch.Tensor) else densities[0].new_zeros(())


def count_active(a: torch.Tensor, threshold: float = 0.0, mask: torch.Tensor | None = None) -> tuple[int, int]:
    """How many activations of real tokens have |a| > threshold, and how many there are.

    Args:
        a: (batch, tokens, neurons), or with `mask=None` any shape.
        threshold: 0 counts what is not exactly 0, in a's own dtype.
        mask: (batch, tokens), 0 or False at padding.

    Returns:
        (active, all). NaN counts as active.
    """
    if mask is not None:
        a = a[(mask != 0).to(a.device)]
    return a.numel() - int((a.abs() <= threshold).sum()), a.numel()


class SizeCounts:
    """How many activations there are of each size |a|, to 1/1024 of it, without keeping them.

    Notable: the bits of a positive float32 are in the order of its value, so its leading bits are the bin.
    """

    _LOST = 13  # of the 23 bits of the fraction

    def __init__(self) -> None:
        self.counts = torch.zeros(2 ** (31 - self._LOST), dtype=torch.int64)

    def add(self, a: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Count a batch; the arguments are those of `count_active`."""
        if mask is not None:
            a = a[(mask != 0).to(a.device)]
        for part in a.detach().flatten().split(2**24):  # no copies of a whole block's activations
            bins = part.float().abs().view(torch.int32) >> self._LOST
            self.counts += torch.bincount(bins, minlength=len(self.counts)).cpu()

    def threshold(self, density: float) -> float:
        """The smallest t for which at most a share of `density` has |a| > t, rounded up to the end of its bin.

        Raises:
            ValueError: more than that share is infinite or NaN.
        """
        above = self.counts.sum() - self.counts.cumsum(0)
        last = int((above <= density * self.counts.sum()).nonzero()[0])
        if last == 0:  # exact zeros, and what float32 hardly tells from them
            return 0.0
        edge = torch.tensor(((last + 1) << self._LOST) - 1, dtype=torch.int32).view(torch.float32).item()
        if not math.isfinite(edge):
            raise ValueError("activations are infinite or NaN: the model is broken, or its dtype is too narrow for it.")
        return edge


def _parts(a: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of (tokens, neurons): on a CPU pieces that stay in its cache, elsewhere one, since each launch costs."""
    flat = a.reshape(-1, a.shape[-1])
    return flat.split(max(1, 2**17 // a.shape[-1])) if a.device.type == "cpu" else (flat,)


def _row_means(a: torch.Tensor, eps: float, kind: str, scratch: torch.Tensor) -> torch.Tensor:
    """The mean of `surrogate` over the neurons, (rows,); for the rational one in `scratch`, of the shape of `a`."""
    if kind != "rational":
        return surrogate(a, eps, kind).mean(dim=-1)
    a = _wide(a)
    # 1 - 1 / (1 + a^2 / eps): fewer passes over memory, and still exactly 0 for zeros
    return 1 - torch.addcmul(a.new_ones(()), a, a, value=1 / eps, out=scratch).reciprocal_().mean(dim=-1)


def _wide(a: torch.Tensor) -> torch.Tensor:
    return a if a.dtype in (torch.float32, torch.float64) else a.float()
