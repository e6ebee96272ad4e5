"""The exit losses: values by hand and by the plain reference, gradients, and how many logits are alive."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from peft_dynamic.functional.exit_loss import exit_losses, exit_losses_reference


def inputs(exits: int, tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (exits, tokens, 6), "weight": (11, 6), "bias": (11,)}
    made: dict[str, Any] = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    made["labels"] = torch.randint(0, 11, (tokens,), generator=generator)
    return made


def gradients(losses: Any, made: dict[str, Any], factor: float = 1.0) -> list[torch.Tensor]:
    wanted = [value for value in made.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    return list(torch.autograd.grad(losses.loss * factor, wanted))


def test_by_hand() -> None:
    # Logits of the two positions are (0, ln 3) and (ln 3, 0), so the label 1 has probability 3/4 and then 1/4.
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    hidden = torch.tensor([[[0.0, math.log(3)], [math.log(3), 0.0]]], requires_grad=True)
    found = exit_losses(hidden, torch.tensor([1, 1]), weight, exit_weights=[2.0])
    each = -math.log(3 / 4) - math.log(1 / 4)
    torch.testing.assert_close(found.nll, torch.tensor([each]))
    torch.testing.assert_close(found.loss.detach(), torch.tensor(2 * each))
    assert found.correct.tolist() == [1.0]
    found.loss.backward()
    # d nll / d logits = p - onehot: (1/4, -1/4) and (3/4, -3/4), times the weight 2
    torch.testing.assert_close(hidden.grad, torch.tensor([[[0.5, -0.5], [1.5, -1.5]]]))


@given(
    exits=st.integers(1, 4),
    tokens=st.integers(0, 9),
    chunk=st.integers(1, 12),
    ignored=st.sets(st.integers(0, 8)),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    softcap=st.sampled_from([None, 2.0]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_plain_reference(
    exits: int,
    tokens: int,
    chunk: int,
    ignored: set[int],
    scale: float,
    softcap: float | None,
    with_bias: bool,
    seed: int,
) -> None:
    made = inputs(exits, tokens, seed=seed)
    if not with_bias:
        made["bias"] = None
    made["labels"][[i for i in ignored if i < tokens]] = -100
    more = {"exit_weights": [0.5 + i for i in range(exits)], "logit_scale": scale, "softcap": softcap}
    found, wanted = exit_losses(**made, **more, chunk=chunk), exit_losses_reference(**made, **more)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, check_dtype=False)
    for mine, other in zip(gradients(found, made, 0.3), gradients(wanted, made, 0.3), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_the_gradient_is_the_slope(name: str) -> None:
    made = inputs(2, 3)
    direction = torch.randn(made[name].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(step: float) -> torch.Tensor:
        moved = made | {name: made[name].detach() + step * direction}
        return exit_losses(**moved, exit_weights=[1.0, 0.5], logit_scale=0.7, softcap=3.0, chunk=2).loss.detach()

    found = exit_losses(**made, exit_weights=[1.0, 0.5], logit_scale=0.7, softcap=3.0)
    (exact,) = torch.autograd.grad(found.loss, made[name])
    torch.testing.assert_close((exact * direction).sum(), (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=1e-7, atol=1e-9)


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    made = inputs(3, 4)
    made["labels"].fill_(-100)
    found = exit_losses(**made)
    assert found.loss.item() == 0.0
    assert found.nll.tolist() == found.correct.tolist() == [0.0] * 3
    for gradient in gradients(found, made):
        assert not gradient.any()


def test_a_frozen_head_gets_no_gradient_and_changes_nothing_else() -> None:
    made = inputs(2, 5)
    wanted = gradients(exit_losses_reference(**made), made)[0]
    made["weight"].requires_grad_(False)
    made["bias"].requires_grad_(False)
    torch.testing.assert_close(gradients(exit_losses(**made), made), [wanted])


def test_frozen_states_leave_the_heads_gradient() -> None:
    made = inputs(2, 5)
    wanted = gradients(exit_losses_reference(**made), made)[1:]
    made["hidden"].requires_grad_(False)
    torch.testing.assert_close(gradients(exit_losses(**made), made), wanted)


def test_without_gradients_the_values_are_the_same() -> None:
    made = inputs(2, 5)
    with torch.no_grad():
        found = exit_losses(**made, chunk=2)
    assert not found.loss.requires_grad
    torch.testing.assert_close(found.loss, exit_losses_reference(**made).loss.detach())


def test_large_logits_stay_finite() -> None:
    hidden = torch.full((1, 1, 2), 1e4, requires_grad=True)
    found = exit_losses(hidden, torch.tensor([1]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert found.loss.item() == 2e4
    found.loss.backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[[2.0, 0.0]]]))


@pytest.mark.parametrize("bits", [torch.bfloat16, torch.float16])
def test_under_autocast_the_heads_gradient_is_summed_in_float32(bits: torch.dtype) -> None:
    # Two positions in each of 512 chunks: summed in bfloat16, the gradient would stop growing at 256 of its steps.
    made = inputs(1, 1, torch.float32)
    made["hidden"] = made["hidden"].detach().expand(1, 1024, 6).clone().requires_grad_()
    made["labels"] = made["labels"].expand(1024).clone()
    with torch.autocast("cpu", bits):
        found = exit_losses(**made, chunk=2)
    wanted = exit_losses_reference(**made)
    torch.testing.assert_close(found.loss.detach(), wanted.loss.detach(), rtol=0.02, atol=0)
    mine = gradients(found, made)
    other = gradients(wanted, made)
    assert [g.dtype for g in mine] == [torch.float32] * 3
    for one, two in zip(mine, other, strict=True):
        assert (one - two).norm() < 0.02 * two.norm()


def test_parameters_of_bfloat16_get_gradients_of_bfloat16() -> None:
    made = inputs(2, 6, torch.bfloat16)
    mine, other = gradients(exit_losses(**made), made), gradients(exit_losses_reference(**made), made)
    for one, two in zip(mine, other, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - two).float().norm() < 0.02 * two.float().norm()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("exits", [1, 4])
def test_logits_are_made_for_one_chunk_and_labelled_positions_only(exits: int) -> None:
    made = inputs(exits, 40) | {"weight": torch.randn(500, 6, dtype=torch.float64), "bias": None}
    made["labels"][7:] = -100
    with Largest() as seen:
        exit_losses(**made, chunk=3).loss.backward()
    assert seen.elements == max(3 * 500, 500 * 6)  # the logits of a chunk, or the head
    with Largest() as seen:
        exit_losses(**made, chunk=100).loss.backward()
    assert seen.elements == exits * 7 * 500
    with Largest() as seen:
        exit_losses_reference(**made)
    assert seen.elements == exits * 40 * 500


def test_one_backward_pass_only() -> None:
    loss = exit_losses(**inputs(1, 3)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"labels \(4,\).*must be \(exits, positions, D\)"),
        ({"weight": torch.zeros(11, 5)}, r"weight \(11, 5\)"),
        ({"hidden": torch.zeros(3, 6)}, r"hidden \(3, 6\)"),
        ({"exit_weights": [1.0]}, r"exit_weights=\[1.0\]: must have one number for each of 2 exits"),
        ({"softcap": 0.0}, r"softcap=0.0: must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exit_losses(**inputs(2, 3) | change)
