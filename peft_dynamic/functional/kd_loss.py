"""Next-token losses against labels and a teacher, of one or several exits, without holding anybody's logits.

With z_i the student's logits at labelled position i, t_i the teacher's, lambda the teacher's weight, and d one of the
divergences of `functional.distill`:

    L = sum_e w_e sum_i ((1 - lambda) (-log p_ei[y_i]) + lambda d(z_ei, t_i))

The teacher is another model's states and head, or the k likeliest tokens of a cache. Or it is the last of the exits
itself, which then has the labels alone and is not moved by what it teaches.

Notable: as in `functional.exit_loss`, the gradients are computed in the forward pass while a chunk's logits are there.
The chunks go over positions, with all exits of a position together, so that the teacher's logits are made once. The
forward divergence is written out; the others let torch differentiate one chunk.

Of a cache the tokens outside the k are one more class, so that with q_t and p_t the masses of that class

    (1)  KL = sum_{v in k} q_v log(q_v / p_v) + q_t log(q_t / p_t)
    (2)  dKL / dz_v = p_v - q_v for v in k,  p_v (1 - q_t / p_t) elsewhere
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from peft_dynamic.functional.distill import divergence, label_loss, manual_logits
from peft_dynamic.functional.exit_loss import _scale_and_cap

CHUNK = 2**23  # logits alive at a time, of each of two or three buffers: 170 positions of a vocabulary of 49152


class Head(NamedTuple):
    """Where a model's states become logits: z = c tanh(s (W h + b) / c), without c just s (W h + b).

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        scale: s.
        softcap: c or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(N, D) to (N, V) float32, without gradients for the head."""
        bias = None if self.bias is None else self.bias.detach().to(states.dtype)
        rows = torch.nn.functional.linear(states, self.weight.detach().to(states.dtype), bias)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        _scale_and_cap(rows, self.scale, self.softcap)
        return rows


class States(NamedTuple):
    """A teacher that is a model: its states at the labelled positions, after the final norm, and its head.

    Attributes:
        states: (N, D).
        head: its head; its vocabulary may be the student's with other padding.
    """

    states: torch.Tensor
    head: Head


class TopK(NamedTuple):
    """A teacher that is the k likeliest tokens of each labelled position, at temperature 1.

    Attributes:
        tokens: (N, k) int64.
        logprobs: (N, k) float32, their logarithms of probability in the whole vocabulary.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Distillation:
    """How much a teacher counts and how it is compared; see `functional.distill`.

    Attributes:
        teacher: a `States` or `TopK`; "last" for the last exit; "smoothing", "manual" or None for none.
        kd_weight, temperature, teacher_scale, divergence, margin: as in `KDConfig`.
        smoothing: a of the two formulas.
    """

    teacher: States | TopK | str | None
    kd_weight: float = 0.5
    temperature: float = 1.0
    teacher_scale: float = 1.0
    divergence: str = "forward_kl"
    margin: float = 0.0
    smoothing: float = 0.1


class KDLosses(NamedTuple):
    """What E exits lose on a batch, in sums over the labelled positions.

    Attributes:
        loss: () L, with gradients.
        nll: (E,) -log p of the labels.
        kd: (E,) the divergence from the teacher; 0 where there is none.
        correct: (E,) positions where no token is likelier than the label.
        agree: (E,) positions where no token is likelier than the teacher's likeliest.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    kd: torch.Tensor
    correct: torch.Tensor
    agree: torch.Tensor


def kd_losses(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Head,
    how: Distillation,
    exit_weights: list[float] | None = None,
    chunk: int | None = None,
) -> KDLosses:
    """The loss L of the module's docstring.

    The products are computed in autocast's type where it is on, else in `hidden`'s; in float32 in place of float16.
    All else is float32.

    Args:
        hidden: (E, N, D) the student's states after the final norm.
        labels: (N,) int64, each position's next token; all count.
        head: the student's; gradients go to it where it is trained.
        how: the teacher.
        exit_weights: w_e; None for 1.
        chunk: positions at a time; None for as many as make `CHUNK` logits.

    Raises:
        ValueError: shapes that do not fit.
    """
    if hidden.dim() != 3 or labels.shape != hidden.shape[1:2] or head.weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}, head {tuple(head.weight.shape)}: must be "
            "(exits, positions, D), (positions,) and (V, D)."
        )
    rows = None
    if isinstance(how.teacher, States | TopK):
        rows = len(how.teacher[0])
    if rows is not None and rows != len(labels):
        raise ValueError(f"the teacher has {rows} positions and the student {len(labels)}.")
    each = [1.0] * len(hidden) if exit_weights is None else list(exit_weights)
    size = max(1, CHUNK // len(head.weight)) if chunk is None else chunk
    return KDLosses(
        *_Losses.apply(hidden, head.weight, head.bias, labels, head, how, each, size, torch.is_grad_enabled())
    )


def kd_losses_reference(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, how: Distillation, exit_weights: list[float] | None = None
) -> torch.Tensor:
    """The loss of `kd_losses` by torch's own operations with all logits alive; for tests."""
    each = [1.0] * len(hidden) if exit_weights is None else exit_weights
    logits = [_plain_logits(states, head) for states in hidden]
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for place, (z, w) in enumerate(zip(logits, each, strict=True)):
        taught = how
        if isinstance(how.teacher, str) and how.teacher == "last":
            last = place == len(hidden) - 1
            taught = Distillation(None) if last else how
        total = total + w * _rows_loss(z, labels, _teacher_rows(taught, logits[-1].detach()), taught)[0].sum()
    return total


def _plain_logits(states: torch.Tensor, head: Head) -> torch.Tensor:
    z = torch.nn.functional.linear(states, head.weight, head.bias).float() * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _teacher_rows(how: Distillation, last: torch.Tensor) -> Any:
    """What rows are compared with: logits, a `TopK`, or None."""
    teacher = how.teacher
    if isinstance(teacher, States):
        return teacher.head.logits(teacher.states)
    if isinstance(teacher, TopK):
        return teacher
    return last if teacher == "last" else None


def _rows_loss(
    z: torch.Tensor, labels: torch.Tensor, taught: Any, how: Distillation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N,) losses, label losses and divergences of rows of logits, by torch's own operations."""
    ce = label_loss(z, labels)
    if how.teacher == "smoothing":
        return label_loss(z, labels, how.smoothing), ce, torch.zeros_like(ce)
    if how.teacher == "manual":
        taught = manual_logits(labels, z.shape[1], how.smoothing)
    if taught is None:
        return ce, ce, torch.zeros_like(ce)
    if isinstance(taught, TopK):
        log_p = torch.log_softmax(z, 1).gather(1, taught.tokens)
        q, tail_q, tail_p = taught.logprobs.exp(), _tail(taught.logprobs), _tail(log_p)
        kd = (q * (taught.logprobs - log_p)).sum(1) + tail_q * (tail_q.log() - tail_p.log())
    else:
        width = min(z.shape[1], taught.shape[1])
        kd = divergence(z[:, :width], taught[:, :width], how.divergence, how.temperature, how.teacher_scale, how.margin)
    return (1 - how.kd_weight) * ce + how.kd_weight * kd, ce, kd


def _tail(logprobs: torch.Tensor) -> torch.Tensor:
    """The mass of all other tokens; never 0, as its logarithm is taken."""
    return (1 - logprobs.exp().sum(1)).clamp(min=1e-7)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        head: Head,
        how: Distillation,
        exit_weights: list[float],
        chunk: int,
        grad: bool,
    ) -> tuple[torch.Tensor, ...]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        dtype = torch.float32 if dtype == torch.float16 else dtype
        wide = torch.promote_types(dtype, torch.float32)
        need_hidden, need_weight, need_bias = (grad and need for need in ctx.needs_input_grad[:3])
        exits, count, _ = hidden.shape
        sums = hidden.new_zeros(4, exits, dtype=wide)  # nll, kd, correct, agree
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        d_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if need_bias else None
        total = hidden.new_zeros((), dtype=wide)
        pieces = max(1, -(-count // chunk))
        size = max(1, -(-count // pieces))  # of equal size: a small last piece would cost as much as a large one
        with torch.autocast(kind, enabled=False):
            cast = weight.to(dtype)
            own_bias = None if bias is None else bias.to(dtype)
            # Buffers for the whole pass: fresh pages for each chunk cost as much as the exponentials
            work = _Buffers(hidden, min(size, count), len(weight), dtype, wide)
            for start in range(0, count, size):
                part = slice(start, min(start + size, count))
                y = labels[part]
                last = None
                if how.teacher == "last" and exits > 1:
                    last = work.logits("teacher", hidden[-1, part].to(dtype), cast, own_bias)
                    _scale_and_cap(last, head.scale, head.softcap)
                elif isinstance(how.teacher, States):
                    last = work.taught(how.teacher, part)
                rule = _rule(how, last, part, work)
                for e in range(exits):
                    h = hidden[e, part].to(dtype)
                    z = work.logits("student", h, cast, own_bias)
                    slope = _scale_and_cap(z, head.scale, head.softcap)
                    alone = how.teacher == "last" and e == exits - 1
                    nll, kd, correct, agree, value = (_labels_alone if alone else rule)(z, y)
                    total += exit_weights[e] * value
                    sums[:, e] += torch.stack([nll, kd, correct, agree])
                    if not (need_hidden or need_weight or need_bias):
                        continue
                    if slope is not None:
                        z.mul_(slope)
                    if exit_weights[e] * head.scale != 1.0:
                        z.mul_(exit_weights[e] * head.scale)
                    if d_bias is not None:
                        d_bias += z.sum(0)
                    d = z.to(dtype)
                    if d_hidden is not None:
                        d_hidden[e, part] = torch.mm(d, cast)
                    if d_weight is not None and dtype == wide:
                        d_weight.addmm_(d.t(), h)
                    elif d_weight is not None:
                        d_weight += torch.mm(d.t(), h)
        ctx.gradients = d_hidden, d_weight, d_bias
        ctx.types = weight.dtype, None if bias is None else bias.dtype
        nll, kd, correct, agree = sums.float()
        ctx.mark_non_differentiable(nll, kd, correct, agree)
        return total, nll, kd, correct, agree

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the losses keep their gradients for one backward pass; run the forward pass again.")
        (d_hidden, d_weight, d_bias), ctx.gradients = ctx.gradients, None
        weight_type, bias_type = ctx.types
        d_hidden = None if d_hidden is None else d_hidden.mul_(grad.to(d_hidden.dtype))
        d_weight = None if d_weight is None else d_weight.mul_(grad).to(weight_type)
        d_bias = None if d_bias is None else d_bias.mul_(grad).to(bias_type)
        return d_hidden, d_weight, d_bias, None, None, None, None, None, None


class _Buffers:
    """Room for the logits of a chunk, taken once."""

    def __init__(self, like: torch.Tensor, rows: int, width: int, dtype: torch.dtype, wide: torch.dtype) -> None:
        self.like, self.rows, self.dtype, self.wide = like, rows, dtype, wide
        self.width = width
        self.kept: dict[str, torch.Tensor] = {}

    def room(self, name: str, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        if name not in self.kept:
            self.kept[name] = self.like.new_empty(self.rows, width, dtype=dtype)
        return self.kept[name][:rows]

    def logits(self, name: str, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """W h + b of a chunk in the wide type."""
        raw = self.room(name if self.dtype == self.wide else "raw", len(h), len(weight), self.dtype)
        torch.mm(h, weight.t(), out=raw)
        if bias is not None:
            raw += bias
        return raw if self.dtype == self.wide else self.room(name, len(h), len(weight), self.wide).copy_(raw)

    def taught(self, teacher: States, part: slice) -> torch.Tensor:
        head = teacher.head
        states = teacher.states[part].to(self.dtype)
        weight = head.weight.detach().to(self.dtype)
        raw = self.room("teacher", len(states), len(weight), self.dtype)
        torch.mm(states, weight.t(), out=raw)
        if head.bias is not None:
            raw += head.bias.detach().to(self.dtype)
        if self.dtype != self.wide:
            raw = self.room("teacher wide", len(raw), len(weight), self.wide).copy_(raw)
        _scale_and_cap(raw, head.scale, head.softcap)
        return raw


Rule = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def _rule(how: Distillation, last: torch.Tensor | None, part: slice, work: _Buffers) -> Rule:
    """What is done with a chunk of the student's logits: sums come back, and the gradient takes the logits' place."""
    if isinstance(how.teacher, TopK):
        return _top_k_rule(TopK(how.teacher.tokens[part], how.teacher.logprobs[part]), how.kd_weight)
    if last is None and how.teacher not in ("smoothing", "manual"):
        return _labels_alone
    if last is not None and how.divergence == "forward_kl" and last.shape[1] == work.width:
        return _forward_rule(last, how, work)
    return _autograd_rule(last, how)


def _labels_alone(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    chosen, top, total = _softmax_(z, y)
    nll = (top + total.log() - chosen).sum()
    z.div_(total).scatter_add_(1, y[:, None], z.new_full((len(y), 1), -1.0))
    none = nll.new_zeros(())
    return nll, none, (chosen >= top).sum(), none, nll


def _softmax_(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(z - max) in place; the label's logits, the maxima and the sums, (N, 1) each."""
    chosen, top = z.gather(1, y[:, None]), z.amax(1, keepdim=True)
    return chosen, top, z.sub_(top).exp_().sum(1, keepdim=True)


def _forward_rule(taught: torch.Tensor, how: Distillation, work: _Buffers) -> Rule:
    """The forward divergence, written out. `taught` becomes q; with several exits it serves them all."""
    share, temperature = how.kd_weight, how.temperature
    peak, best = taught.max(1, keepdim=True)
    q = taught.sub_(peak)
    if how.teacher_scale != temperature:
        q.mul_(how.teacher_scale / temperature)
    # sum q log q = sum q (t - log sum exp t): the dot product before t is overwritten needs one more buffer
    exponent = work.room("exponent", len(q), q.shape[1], q.dtype).copy_(q)
    mass = q.exp_().sum(1, keepdim=True)
    q.div_(mass)
    entropy = _dot(q, exponent) - mass.log().squeeze(1)

    def rule(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cross = _dot(q, z)  # sum q z, before z is overwritten
        theirs = z.gather(1, best)
        if temperature == 1.0:
            chosen, top, total = _softmax_(z, y)
            log_total = (top + total.log()).squeeze(1)
            kd = entropy - cross + log_total
            z.div_(total).sub_(q, alpha=share)
        else:
            soft = work.room("exponent", len(z), z.shape[1], z.dtype).copy_(z)
            chosen, top, total = _softmax_(z, y)
            log_total = (top + total.log()).squeeze(1)
            mass_p = soft.sub_(top).div_(temperature).exp_().sum(1, keepdim=True)
            kd = entropy - cross / temperature + (top / temperature + mass_p.log()).squeeze(1)
            kd = kd * temperature**2
            soft.div_(mass_p).sub_(q)
            z.mul_((1 - share) / total).add_(soft, alpha=share * temperature)
        z.scatter_add_(1, y[:, None], z.new_full((len(y), 1), share - 1.0))
        nll = log_total - chosen.squeeze(1)
        value = (1 - share) * nll.sum() + share * kd.sum()
        return nll.sum(), kd.sum(), (chosen >= top).sum(), (theirs >= top).sum(), value

    return rule


def _top_k_rule(taught: TopK, share: float) -> Rule:
    """Equations (1) and (2)."""

    def rule(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens, log_q = taught.tokens, taught.logprobs.to(z.dtype)
        inside = z.gather(1, tokens)
        chosen, top, total = _softmax_(z, y)
        log_total = top + total.log()
        log_p = inside - log_total
        q, tail_q, tail_p = log_q.exp(), _tail(log_q), _tail(log_p)
        kd = (q * (log_q - log_p)).sum(1) + tail_q * (tail_q.log() - tail_p.log())
        ratio = (tail_q / tail_p)[:, None]
        z.mul_((1 - share * ratio) / total)
        z.scatter_add_(1, tokens, share * (log_p.exp() * ratio - q))
        z.scatter_add_(1, y[:, None], z.new_full((len(y), 1), share - 1.0))
        nll = (log_total - chosen).squeeze(1)
        agree = inside.gather(1, log_q.argmax(1, keepdim=True)) >= top
        return nll.sum(), kd.sum(), (chosen >= top).sum(), agree.sum(), (1 - share) * nll.sum() + share * kd.sum()

    return rule


def _autograd_rule(taught: torch.Tensor | None, how: Distillation) -> Rule:
    """The other divergences and the formulas: torch differentiates the chunk."""

    def rule(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            leaf = z.detach().clone().requires_grad_(True)
            each, ce, kd = _rows_loss(leaf, y, taught, how)
            (slope,) = torch.autograd.grad(each.sum(), leaf)
        top = z.amax(1)
        correct = z.gather(1, y[:, None]).squeeze(1) >= top
        agree = correct.new_zeros(()) if taught is None else _agree(z, taught, top)
        z.copy_(slope)
        return ce.detach().sum(), kd.detach().sum(), correct.sum(), agree.sum(), each.detach().sum()

    return rule


def _agree(z: torch.Tensor, taught: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    best = taught[:, : z.shape[1]].argmax(1, keepdim=True)
    return z.gather(1, best).squeeze(1) >= top


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(N,) dot products of rows, without their elementwise product in memory."""
    return torch.bmm(one[:, None], other[:, :, None]).flatten()
