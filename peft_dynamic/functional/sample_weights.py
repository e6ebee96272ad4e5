"""How much the label and how much the teacher counts in each row: RW-KD's weights, without second derivatives.

With CE_i and KD_i the losses of row i, a step is tried with weights eps of 0, and the loss of other rows is taken after
it. How that loss would fall with eps is known without the step: since eps is 0 nothing moves, and with g the gradient
of the other rows' loss

    (1)  u(l_i) = max(<g, grad l_i>, 1e-8)          for l_i = CE_i and l_i = KD_i
    (2)  lambda_i = u(KD_i) / (u(CE_i) + u(KD_i))

The learning rate and the factor beta of the paper's algorithm stand before <g, grad l_i>, and go out in (2), but for
the bound of 1e-8: here both are 1. The product is the slope of l_i along g, taken from two passes without gradients,

    (3)  <g, grad l_i> = (l_i(theta + s g) - l_i(theta - s g)) / (2 s)   with s = h / ||g||

so that it needs no derivative of a derivative, which PyTorch's fused attention does not have.

Source: P. Lu, A. Ghaddar, A. Rashid, M. Rezagholizadeh, A. Ghodsi, P. Langlais: RW-KD: Sample-wise Loss Terms
Re-Weighting for Knowledge Distillation, Findings of EMNLP 2021. The procedure is taken from accounts of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

LEAST = 1e-8


def slopes(
    losses: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor], direction: Sequence[torch.Tensor]
) -> torch.Tensor:
    """<g, grad l> of each loss: equation (3). The parameters are moved for it, and put back also after an error.

    Args:
        losses: computes the losses at the parameters as they are; each of its calls must draw the same.
        parameters: theta.
        direction: g, of the parameters' shapes.

    Returns:
        What `losses` gives, with slopes for losses.
    """
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in direction))
    saved = [p.detach().clone() for p in parameters]
    # h balances the error of the quotient, which falls with it, and the rounding of the losses, which grows
    step = 2 * max(torch.finfo(p.dtype).eps for p in parameters) ** (1 / 3) / (norm or 1.0)
    sides = []
    with torch.no_grad():
        try:
            for way in (step, -step):
                for p, own, g in zip(parameters, saved, direction, strict=True):
                    p.copy_(own + way * g)
                sides.append(losses())
        finally:
            for p, own in zip(parameters, saved, strict=True):
                p.copy_(own)
    return (sides[0] - sides[1]) / (2 * step)


def shares(labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Lambda of each row, the teacher's share: equations (1) and (2). It is 1/2 where neither loss helps.

    Args:
        labels: (N,) the slopes of the labels' losses.
        teacher: (N,) those of the teacher's.

    Returns:
        (N,) from 0 to 1.
    """
    one, other = labels.clamp(min=LEAST), teacher.clamp(min=LEAST)
    return other / (one + other)
