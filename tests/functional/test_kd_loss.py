"""The chunked losses against labels and a teacher: torch's own operations, in value and gradients."""

import dataclasses
from typing import Any

import pytest
import torch

from peft_dynamic.functional.exit_loss import exit_losses
from peft_dynamic.functional.kd_loss import Distillation, Head, States, TopK, kd_losses, kd_losses_reference

V, D, N = 37, 8, 11


def parts(seed: int = 0, exits: int = 1, dtype: torch.dtype = torch.float64, **head: Any) -> tuple[Any, Any, Head]:
    torch.manual_seed(seed)
    hidden = torch.randn(exits, N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    return hidden, torch.randint(V, (N,)), Head(weight, bias, **head)


def states(width: int = V, dtype: torch.dtype = torch.float64, **head: Any) -> States:
    torch.manual_seed(9)
    return States(torch.randn(N, D + 2, dtype=dtype), Head(torch.randn(width, D + 2, dtype=dtype), **head))


def top_k(k: int = 5) -> TopK:
    torch.manual_seed(8)
    logprobs, tokens = torch.randn(N, V, dtype=torch.float64).log_softmax(1).topk(k)
    return TopK(tokens, logprobs)


HOW: dict[str, Distillation] = {
    "states": Distillation(states(), 0.3),
    "hot": Distillation(states(), 0.3, temperature=2.5, teacher_scale=0.6),
    "scaled": Distillation(states(scale=0.5, softcap=3.0), 0.7, teacher_scale=0.4),
    "teacher alone": Distillation(states(), 1.0),
    "labels alone": Distillation(None),
    "narrow teacher": Distillation(states(V - 4), 0.5),
    "wide teacher": Distillation(states(V + 4), 0.5),
    "reverse": Distillation(states(), 0.4, 2.0, divergence="reverse_kl"),
    "jsd": Distillation(states(), 0.4, divergence="jsd"),
    "mse": Distillation(states(), 0.4, divergence="mse", teacher_scale=0.5),
    "hinge": Distillation(states(), 0.4, divergence="hinge", margin=3.0),
    "smoothing": Distillation("smoothing", smoothing=0.2),
    "manual": Distillation("manual", 0.4, temperature=3.0),
    "top-k": Distillation(top_k(), 0.6),
    "top-k alone": Distillation(top_k(1), 1.0),
    "last": Distillation("last", 0.5),
    "last, hot": Distillation("last", 0.5, temperature=2.0),
    "last, reverse": Distillation("last", 0.5, divergence="reverse_kl"),
}


@pytest.mark.parametrize("name", HOW)
@pytest.mark.parametrize("head", [{}, {"scale": 0.7, "softcap": 4.0}])
def test_value_and_gradients(name: str, head: dict[str, float]) -> None:
    how = HOW[name]
    exits = 3 if how.teacher == "last" else 2
    hidden, labels, own = parts(exits=exits, **head)
    leaves = [hidden, own.weight, own.bias]
    wanted = kd_losses_reference(hidden.double(), labels, own, how, [1.0, 2.0, 0.5][:exits])
    slopes = torch.autograd.grad(wanted * 1.5, leaves)
    for chunk in (None, 1, 4):
        found = kd_losses(hidden, labels, own, how, [1.0, 2.0, 0.5][:exits], chunk)
        # the reference adds up in float32
        torch.testing.assert_close(found.loss, wanted.to(found.loss), rtol=1e-5, atol=1e-5)
        for slope, got in zip(slopes, torch.autograd.grad(found.loss * 1.5, leaves), strict=True):
            torch.testing.assert_close(got, slope, rtol=1e-4, atol=1e-5)


def test_what_is_reported() -> None:
    hidden, labels, own = parts(exits=2)
    how = Distillation(states(), 0.25)
    found = kd_losses(hidden, labels, own, how, [1.0, 3.0])
    each = (0.75 * found.nll + 0.25 * found.kd) * torch.tensor([1.0, 3.0])
    torch.testing.assert_close(found.loss.float(), each.sum())
    plain = exit_losses(hidden, labels, own.weight, own.bias)
    torch.testing.assert_close(found.nll, plain.nll.float())
    torch.testing.assert_close(found.correct, plain.correct)
    t = how.teacher.head.logits(how.teacher.states).argmax(1)
    for e in range(2):
        z = own.logits(hidden[e].detach())
        assert found.agree[e] == (z.argmax(1) == t).sum()


def test_a_tail_is_a_class_of_its_own() -> None:
    """p_T = (.7, .2, .06, .04), p_S = (.4, .3, .2, .1), k = 2: by hand.

    .7 ln(.7/.4) + .2 ln(.2/.3) + .1 ln(.1/.3) = .3917310 - .0810930 - .1098612 = .2007768, of .2017480 for all four.
    """
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    q = torch.tensor([[0.7, 0.2, 0.06, 0.04]]).log()
    head, labels = Head(torch.eye(4)), torch.tensor([0])
    tokens = torch.tensor([[0, 1]])
    tail = kd_losses(p[None], labels, head, Distillation(TopK(tokens, q[:, :2]), 1.0))
    assert tail.loss.item() == pytest.approx(0.2007768, abs=1e-6)
    whole = kd_losses(p[None], labels, head, Distillation(States(q, head), 1.0))
    assert whole.loss.item() == pytest.approx(0.2017480, abs=1e-6)


def test_a_last_exit_that_teaches_is_not_taught() -> None:
    """Its gradient is that of the labels alone, and the teacher's part sends none to it."""
    hidden, labels, own = parts(exits=3)
    frozen = own._replace(weight=own.weight.detach(), bias=None)
    found = kd_losses(hidden, labels, frozen, Distillation("last", 0.9))
    (slope,) = torch.autograd.grad(found.loss, hidden)
    alone = kd_losses(hidden[-1:], labels, frozen, Distillation(None))
    (wanted,) = torch.autograd.grad(alone.loss, hidden)
    torch.testing.assert_close(slope[-1], wanted[-1])
    assert found.kd[-1] == 0
    assert found.kd[0] > 0


def test_no_labelled_position() -> None:
    hidden, labels, own = parts()
    for how in (Distillation(States(torch.zeros(0, D).double(), own), 0.5), Distillation(None), Distillation("last")):
        found = kd_losses(hidden[:, :0], labels[:0], own, how)
        assert found.loss == 0
        found.loss.backward()
        assert hidden.grad is not None
        assert not hidden.grad.any()


def test_bfloat16_and_autocast() -> None:
    hidden, labels, own = parts(dtype=torch.float32)
    how = Distillation(states(dtype=torch.float32), 0.5, 2.0)
    exact = kd_losses(hidden, labels, own, how)
    half = Head(own.weight.detach().bfloat16(), None)
    low = kd_losses(hidden.detach().bfloat16(), labels, half, how)
    assert low.loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = kd_losses(hidden, labels, own, how)
    torch.testing.assert_close(cast.loss, exact.loss, rtol=0.05, atol=0.1)
    cast.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


def test_gradients_once_and_without() -> None:
    hidden, labels, own = parts()
    found = kd_losses(hidden, labels, own, HOW["states"])
    found.loss.backward()
    with pytest.raises(RuntimeError, match="one backward pass"):
        found.loss.backward()
    with torch.no_grad():
        assert not kd_losses(hidden, labels, own, HOW["states"]).loss.requires_grad


@pytest.mark.parametrize("wrong", ["labels", "teacher", "head"])
def test_shapes(wrong: str) -> None:
    hidden, labels, own = parts()
    how = HOW["states"]
    if wrong == "labels":
        labels = labels[1:]
    elif wrong == "head":
        own = own._replace(weight=own.weight[:, 1:])
    else:
        assert isinstance(how.teacher, States)
        how = dataclasses.replace(how, teacher=how.teacher._replace(states=how.teacher.states[1:]))
    with pytest.raises(ValueError, match=r"must be \(exits, positions, D\)|the teacher has 10 positions"):
        kd_losses(hidden, labels, own, how)
