"""The density mathematics, with the arithmetic beside each expected number."""

import math

import pytest
import torch

from peft_dynamic.functional.density import (
    SURROGATES,
    combine,
    count_active,
    layer_density,
    surrogate,
    surrogate_gradient,
    token_weights,
)


def test_surrogates_by_hand() -> None:
    a = torch.tensor([0.0, 1.0, -3.0, 2.0])
    # eps 1: 0/(0+1), 1/(1+1), 9/(9+1), 4/(4+1)
    torch.testing.assert_close(surrogate(a, 1.0), torch.tensor([0.0, 0.5, 0.9, 0.8]))
    # eps 4, width 2: tanh(0), tanh(1/2), tanh(3/2), tanh(2/2)
    torch.testing.assert_close(
        surrogate(a, 4.0, "tanh"), torch.tensor([0.0, math.tanh(0.5), math.tanh(1.5), math.tanh(1.0)])
    )
    # width 2: 0/2, 1/2, min(1, 3/2), 2/2
    torch.testing.assert_close(surrogate(a, 4.0, "hinge"), torch.tensor([0.0, 0.5, 1.0, 1.0]))


def test_gradients_by_hand() -> None:
    a = torch.tensor([0.0, 1.0, -3.0])
    # rational, eps 1: 2 a / (a^2 + 1)^2 = 0, 2/4, -6/100
    torch.testing.assert_close(surrogate_gradient(a, 1.0), torch.tensor([0.0, 0.5, -0.06]))
    # hinge, width 2: the sign over 2 inside, 0 outside and at 0
    torch.testing.assert_close(surrogate_gradient(a, 4.0, "hinge"), torch.tensor([0.0, 0.5, 0.0]))
    # tanh, width 2: (1 - tanh(1/2)^2) / 2
    torch.testing.assert_close(surrogate_gradient(a, 4.0, "tanh")[1].item(), (1 - math.tanh(0.5) ** 2) / 2)
    # the authors' eps: the peak is at sqrt(eps / 3) = 1.826e-4, where it is 2 x eps / (4 eps / 3)^2 = 9/8 x / eps
    peak = math.sqrt(1e-7 / 3)
    values = surrogate_gradient(torch.tensor([0.9 * peak, peak, 1.1 * peak]), 1e-7)
    assert values[1] == pytest.approx(9 / 8 * peak / 1e-7, rel=1e-5)
    assert values[1] > max(values[0], values[2])


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_in_double(kind: str, masked: bool) -> None:
    torch.manual_seed(0)
    a = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = token_weights(torch.tensor([[1, 1, 0], [0, 1, 1]])) if masked else None
    assert torch.autograd.gradcheck(lambda x: layer_density(x, weights, 0.3, kind), (a,))
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: surrogate(x, 0.3, kind).sum(), (x,))
    (gradient,) = torch.autograd.grad(surrogate(x, 0.3, kind).sum(), x)
    torch.testing.assert_close(surrogate_gradient(x, 0.3, kind).detach(), gradient)


def test_the_output_remade_from_the_input_has_the_same_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    gelu = torch.nn.functional.gelu
    (wanted,) = torch.autograd.grad(layer_density(gelu(x), None, 0.1), x)
    (found,) = torch.autograd.grad(layer_density(gelu(x), None, 0.1, source=x, remake=gelu), x)
    assert torch.equal(found, wanted)


def test_the_masked_mean_by_hand() -> None:
    # eps 1, one neuron: s = 0.5, 0.8, 0.9 for a = 1, 2, 3
    a = torch.tensor([[[1.0], [2.0]], [[3.0], [100.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    # samples: (0.5 + 0.8) / 2 = 0.65 and 0.9; mean 0.775. Over tokens it would be 2.2 / 3 = 0.7333
    assert layer_density(a, token_weights(mask), 1.0).item() == pytest.approx(0.775)
    torch.testing.assert_close(token_weights(mask), torch.tensor([[0.25, 0.25], [0.5, 0.0]]))
    # a sample of padding alone does not count; nor does a batch of such samples divide by 0
    assert layer_density(a, token_weights(torch.tensor([[1, 1], [0, 0]])), 1.0).item() == pytest.approx(0.65)
    assert layer_density(a, token_weights(torch.zeros(2, 2)), 1.0).item() == 0.0


def test_layers_and_stacks_by_hand() -> None:
    layers = [torch.tensor(value) for value in (0.2, 0.4, 0.6)]
    assert combine(layers).item() == pytest.approx((0.2 + 0.4 + 0.6) / 3)
    assert combine(layers, [1, 0, 3]).item() == pytest.approx((0.2 + 3 * 0.6) / 3)
    stacks = ["encoder", "encoder", "decoder"]
    assert combine(layers, None, stacks).item() == pytest.approx((0.2 + 0.4) / 2 + 0.6)
    assert combine(layers, [0.0, 0.0, 0.0]).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_pieces_of_a_large_tensor_give_what_the_plain_formula_gives(dtype: torch.dtype, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a = (torch.randn(2, 151, 1024, generator=generator) * 1e-3).to(dtype)  # 302 rows: two pieces of 128, one of 46
    mask = torch.rand(2, 151, generator=generator) < 0.7
    weights = token_weights(mask) if masked else torch.full((2, 151), 1 / 302)
    plain = a.float().requires_grad_()
    expected = (surrogate(plain).mean(-1) * weights).sum()
    (wanted,) = torch.autograd.grad(expected, plain)
    own = a.clone().requires_grad_()
    found = layer_density(own, weights if masked else None)
    (gradient,) = torch.autograd.grad(found, own)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, wanted.to(dtype))
    assert layer_density(torch.zeros_like(a)).item() == 0.0  # to the bit: dead neurons are none


def test_half_precision_is_computed_in_float32() -> None:
    # 1.5e-4 squared is 2.25e-8, below float16's smallest 6e-8; the right answer is 2.25e-8 / 1.225e-7 = 0.1837
    for dtype in (torch.float16, torch.bfloat16):
        a = torch.full((1, 2, 3), 1.5e-4, dtype=dtype, requires_grad=True)
        density = layer_density(a)
        assert density.dtype == torch.float32
        assert density.item() == pytest.approx(0.1837, rel=2e-2)
        density.backward()
        assert a.grad.dtype == dtype
        # 2 a eps / (a^2 + eps)^2 / 6 = 2 * 1.5e-4 * 1e-7 / (1.225e-7)^2 / 6 = 333
        assert a.grad[0, 0, 0].item() == pytest.approx(333, rel=2e-2)


def test_counts_by_hand() -> None:
    a = torch.tensor([[[0.0, -0.0, 0.5], [2.0, 0.0, -3.0]]])
    assert count_active(a) == (3, 6)
    assert count_active(a, 0.5) == (2, 6)
    assert count_active(a, 0.0, torch.tensor([[1, 0]])) == (1, 3)
    assert count_active(torch.tensor([math.nan, 0.0])) == (1, 2)


def test_unknown_surrogate() -> None:
    for function in (surrogate, surrogate_gradient):
        with pytest.raises(ValueError, match="surrogate must be one of"):
            function(torch.zeros(1), 1.0, "l0")
