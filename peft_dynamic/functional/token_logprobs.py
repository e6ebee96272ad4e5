"""Log-probabilities of given tokens from hidden states, without a tensor of tokens times vocabulary.

For token y with hidden state h, weights W, bias b and scale s (1 / temperature, mostly):

    (1)  z = s (W h + b),   log p(y) = z_y - log sum_v exp z_v
    (2)  d log p(y) / dh = s (W_y - sum_v p_v W_v)

Notable: (2) does not depend on what comes after, so it is computed while the logits of a chunk are at hand, and the
backward pass is one multiplication. Only a trained W needs the logits a second time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK = 128  # tokens whose logits exist at the same time


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, scale: float
    ) -> torch.Tensor:
        logprobs = torch.empty(len(ids), dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _chunks(ids):
            logits = _logits(hidden[part], weight, bias, scale)
            picked = logits.gather(1, ids[part, None])[:, 0]
            # One exponential for the normaliser and for p, in place: the passes over memory are what takes time here
            largest = logits.amax(dim=1, keepdim=True)
            p = logits.sub_(largest).exp_()
            total = p.sum(dim=1, keepdim=True)
            logprobs[part] = picked - (largest + total.log())[:, 0]
            if slope is not None:
                slope[part] = (weight[ids[part]] - (p.to(weight.dtype) @ weight) / total.to(weight.dtype)) * scale
        ctx.save_for_backward(hidden, weight, bias, ids, slope)
        ctx.scale = scale
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, ids, slope = ctx.saved_tensors
        d_hidden = slope * gradient[:, None].to(slope.dtype) if slope is not None else None
        wants_weight, wants_bias = ctx.needs_input_grad[1:3]
        d_weight = torch.zeros_like(weight) if wants_weight else None
        d_bias = torch.zeros_like(bias) if wants_bias else None
        for part in _chunks(ids) if wants_weight or wants_bias else ():
            d_logits = torch.softmax(_logits(hidden[part], weight, bias, ctx.scale), dim=1)
            d_logits.scatter_add_(1, ids[part, None], torch.full_like(d_logits[:, :1], -1.0))
            d_logits *= (-ctx.scale) * gradient[part, None]
            if d_weight is not None:
                d_weight.addmm_(d_logits.T.to(weight.dtype), hidden[part])
            if d_bias is not None:
                d_bias += d_logits.sum(0).to(d_bias.dtype)
        return d_hidden, d_weight, d_bias, None, None


def _chunks(ids: torch.Tensor) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, len(ids), CHUNK)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    scaled = None if bias is None else bias * scale
    return torch.nn.functional.linear(hidden * scale, weight, scaled).float()


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Log-probability of each token under a linear language-model head: equation (1), in chunks of `CHUNK` tokens.

    Args:
        hidden: (tokens, features) that the head would read.
        weight: (vocabulary, features) of the head.
        bias: (vocabulary,) or None.
        ids: (tokens,) int64.
        scale: factor of the logits.

    Returns:
        (tokens,) float32, differentiable by hidden, weight and bias.
    """
    return _TokenLogprobs.apply(hidden.to(weight.dtype), weight, bias, ids, scale)
