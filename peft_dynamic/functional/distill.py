"""What distillation compares: rows of a student's logits with a teacher's, or with a teacher that is only a formula.

With z_S, z_T the logits over K classes (or tokens), T a temperature, phi a factor of the teacher's logits,
p = softmax(z_S / T) and q = softmax(phi z_T / T):

    (1)  forward_kl  T^2 sum_k q_k log(q_k / p_k)
    (2)  reverse_kl  T^2 sum_k p_k log(p_k / q_k)
    (3)  jsd         T^2 (sum_k q_k log(q_k / m_k) + sum_k p_k log(p_k / m_k)) / 2      with m = (p + q) / 2
    (4)  mse         sum_k (z_Sk - phi z_Tk)^2 / K
    (5)  hinge       max(0, sum_k (z_Sk - phi z_Tk)^2 - m phi)                          with a margin m

The factor T^2 keeps the gradient's size over T: (1) goes to sum_k (c_Sk - c_Tk)^2 / (2K) as T grows, c the logits less
their mean. (4) is Annealing-KD's, a mean over classes as in its authors' code. (5) is Continuation-KD's, a sum.

All is computed in float32, or wider where the logits are. Gradients go to the student only.

Sources: G. Hinton, O. Vinyals, J. Dean: Distilling the Knowledge in a Neural Network, arXiv 1503.02531, for (1).
A. Jafari, M. Rezagholizadeh, P. Sharma, A. Ghodsi: Annealing Knowledge Distillation, EACL 2021, arXiv 2104.07163.
A. Jafari, I. Kobyzev, M. Rezagholizadeh, P. Poupart, A. Ghodsi: Continuation KD, Findings of EMNLP 2022,
arXiv 2212.05998.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, log_softmax

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mse", "hinge")
IGNORED = -100


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    scale: float = 1.0,
    margin: float = 0.0,
) -> torch.Tensor:
    """How far each row of the student's logits is from the teacher's: equations (1) to (5).

    Args:
        student: (N, K) logits.
        teacher: (N, K) logits; taken as they are, without gradients.
        kind: one of `DIVERGENCES`.
        temperature: T > 0; of (1) to (3).
        scale: phi, the factor of the teacher's logits.
        margin: m of the hinge.

    Returns:
        (N,) float32.

    Raises:
        ValueError: shapes that differ, or a kind that is not known. Shapes that broadcast are no fit either: (N, 1)
            against (N,) would compare every row with every other.
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}: both must be (rows, classes)."
        )
    if kind not in DIVERGENCES:
        raise ValueError(f"divergence={kind!r}: must be one of {', '.join(DIVERGENCES)}.")
    student, teacher = _wide(student), _wide(teacher.detach()) * scale
    if kind in ("mse", "hinge"):
        squares = (student - teacher).square()
        return squares.mean(1) if kind == "mse" else (squares.sum(1) - margin * scale).clamp(min=0)
    p, q = log_softmax(student / temperature, 1), log_softmax(teacher / temperature, 1)
    if kind == "forward_kl":
        each = _kl(q, p)
    elif kind == "reverse_kl":
        each = _kl(p, q)
    else:
        middle = torch.logaddexp(p, q) - torch.log(p.new_tensor(2.0))
        each = (_kl(q, middle) + _kl(p, middle)) / 2
    return each * temperature**2


def label_loss(student: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """-log p of each row's label; with smoothing a, against (1 - a) of the label and a spread over all classes.

    Args:
        student: (N, K) logits.
        labels: (N,) int64; -100 for a row without a label, which loses 0.
        smoothing: a, from 0 to 1.

    Returns:
        (N,) float32.
    """
    return cross_entropy(_wide(student), labels, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)


def manual_logits(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """The logits of a teacher that is 1 - a sure of the label and takes all other classes for equally likely (TF-reg).

    Args:
        labels: (N,) int64 of 0 to K - 1; of a row without a label, -100, all classes are equally likely.
        classes: K, at least 2.
        smoothing: a, greater than 0 and less than 1; the paper's 1 - a is at least 0.9.

    Returns:
        (N, K) float32, logarithms of the probabilities.

    Source: L. Yuan, F. E. H. Tay, G. Li, T. Wang, J. Feng: Revisiting Knowledge Distillation via Label Smoothing
    Regularization, CVPR 2020, arXiv 1909.11723.
    """
    rows = torch.full((len(labels), classes), smoothing / (classes - 1), device=labels.device)
    known = labels != IGNORED
    rows[known] = rows[known].scatter(1, labels[known, None], 1 - smoothing)
    rows[~known] = 1 / classes
    return rows.log()


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """sum_k p_k log(p_k / q_k) of log-probabilities; a class of probability 0 in p adds 0."""
    inside = p > -torch.inf
    return torch.where(inside, p.exp() * (p.where(inside, 0.0) - q.where(inside, 0.0)), 0.0).sum(1)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
