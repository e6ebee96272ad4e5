"""Distillation's rows against numbers worked out by hand, and against torch's and the papers' other forms."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from peft_dynamic.functional.distill import DIVERGENCES, divergence, label_loss, manual_logits

STUDENT, TEACHER = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])


def test_by_hand() -> None:
    # T = 2: q = sigmoid(1) = .731059, p = sigmoid(.5) = .622459
    # KL = .731059 ln(.731059/.622459) + .268941 ln(.268941/.377541) = .0263446, and T^2 KL = .1053783
    assert divergence(STUDENT, TEACHER, temperature=2.0).item() == pytest.approx(0.1053783, abs=1e-6)
    # the other way round, without T^2
    assert divergence(STUDENT, TEACHER, "reverse_kl", 2.0).item() / 4 == pytest.approx(0.0279550, abs=1e-6)
    # CE = ln(1 + e^-1) = .3132617, so half of each is .2093200
    loss = 0.5 * label_loss(STUDENT, torch.tensor([0])) + 0.5 * divergence(STUDENT, TEACHER, temperature=2.0)
    assert loss.item() == pytest.approx(0.2093200, abs=1e-6)
    # ((1 - 2)^2 + 0) / 2
    assert divergence(STUDENT, TEACHER, "mse").item() == 0.5
    # z_S = (1, 1), phi z_T = (1, 0): 1 - .4 * .5 = .8
    assert divergence(torch.ones(1, 2), TEACHER, "hinge", scale=0.5, margin=0.4).item() == pytest.approx(0.8)
    assert divergence(torch.ones(1, 2), TEACHER, "hinge", scale=0.5, margin=2.1).item() == 0


@pytest.mark.parametrize(
    ("temperature", "value"), [(1, 0.0671), (2, 0.1054), (4, 0.1196), (16, 0.1247), (1000, 0.1250)]
)
def test_limit_of_a_high_temperature(temperature: float, value: float) -> None:
    # sum of squares of the logits less their means, over 2 K: (.25 + .25) / 4 = .125
    found = divergence(STUDENT.double(), TEACHER.double(), temperature=temperature).item()
    assert found == pytest.approx(value, abs=5e-5)


def test_label_smoothing_is_torchs() -> None:
    # z = (2, 1, 0), a = .1: logsumexp = 2.4076060; .9333 * .4076060 + .0333 * (1.4076060 + 2.4076060) = .5076060
    assert label_loss(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]), 0.1).item() == pytest.approx(0.5076060)
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 5), torch.randint(5, (7,))
    wanted = cross_entropy(logits, labels, label_smoothing=0.3)
    torch.testing.assert_close(label_loss(logits, labels, 0.3).mean(), wanted)


@pytest.mark.parametrize("weight", [0.2, 0.7])
def test_at_temperature_one_a_teacher_is_another_target(weight: float) -> None:
    """(1 - w) CE + w KL has the gradient of the cross entropy against (1 - w) y + w q; TF-reg too."""
    torch.manual_seed(1)
    logits, labels = torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,))
    for teacher in (torch.randn(6, 4), manual_logits(labels, 4, 0.1)):
        target = (1 - weight) * torch.eye(4)[labels] + weight * softmax(teacher, 1)
        ours = ((1 - weight) * label_loss(logits, labels) + weight * divergence(logits, teacher)).sum()
        (got,) = torch.autograd.grad(ours, logits)
        (wanted,) = torch.autograd.grad(-(target * log_softmax(logits, 1)).sum(), logits)
        torch.testing.assert_close(got, wanted)


def test_manual_teacher() -> None:
    rows = manual_logits(torch.tensor([2, 0, -100]), 3, 0.1).exp()
    wanted = torch.tensor([[0.05, 0.05, 0.9], [0.9, 0.05, 0.05], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(rows, wanted)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_against_torchs_divergence(kind: str) -> None:
    torch.manual_seed(2)
    student, teacher = torch.randn(5, 9), torch.randn(5, 9)
    p, q = log_softmax(student / 3, 1), log_softmax(teacher * 0.5 / 3, 1)
    middle = ((p.exp() + q.exp()) / 2).log()

    def kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return kl_div(second, first, reduction="none", log_target=True).sum(1)

    wanted = {"forward_kl": kl(q, p), "reverse_kl": kl(p, q), "jsd": (kl(q, middle) + kl(p, middle)) / 2}[kind] * 9
    torch.testing.assert_close(divergence(student, teacher, kind, 3.0, 0.5), wanted)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_rows_half_precision_and_gradients(kind: str) -> None:
    torch.manual_seed(3)
    student, teacher = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6).double()
    teacher.requires_grad_(True)
    divergence(student, teacher, kind, 1.0, 0.7, 0.1).sum().backward()
    assert teacher.grad is None  # the teacher is not trained
    assert torch.autograd.gradcheck(lambda z: divergence(z, teacher.detach(), kind, 1.0, 0.7, 0.1), student)
    half = divergence(student.detach().bfloat16(), teacher.detach().bfloat16(), kind)
    assert half.dtype == torch.float32
    alone = divergence(student[2:3], teacher[2:3], kind)
    torch.testing.assert_close(divergence(student, teacher, kind)[2:3], alone)


def test_classes_that_a_teacher_rules_out() -> None:
    teacher = torch.tensor([[0.0, -math.inf, 1.0]])
    student = torch.tensor([[0.3, 0.2, 0.1]], requires_grad=True)
    value = divergence(student, teacher)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, softmax(student.detach(), 1) - softmax(teacher, 1))


@pytest.mark.parametrize(("one", "other"), [((4, 1), (4,)), ((4, 3), (4, 2)), ((3,), (3,)), ((2, 3, 4), (2, 3, 4))])
def test_shapes_that_would_broadcast_are_refused(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(rows, classes\)"):
        divergence(torch.zeros(one), torch.zeros(other), "mse")


def test_a_kind_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="forward_kl, reverse_kl"):
        divergence(STUDENT, TEACHER, "kl")
