"""Rank slicing, the best approximation and the scales, against figures worked out by hand and against numpy's SVD."""

import math
from typing import Any

import pytest
import torch

from peft_dynamic.functional.ranks import (
    SCALING_RULES,
    alpha_at,
    draw_rank,
    leading_components,
    rank_weights,
    slice_rank,
)


def test_a_prefix_of_rows_and_columns() -> None:
    factor = torch.arange(12.0).view(4, 3)
    assert slice_rank(factor, 0, 2, 4).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert slice_rank(factor, 1, 1, 3).tolist() == [[0], [3], [6], [9]]
    assert slice_rank(factor, 0, 4, 4) is factor


def test_a_prefix_inside_each_group() -> None:
    # two experts of rank 3 in A's rows: (experts, r); three ranks of two experts in B's columns: (r, experts)
    rows = torch.tensor([10.0, 11, 12, 20, 21, 22])[:, None]
    assert slice_rank(rows, 0, 2, 3, (2, 1)).flatten().tolist() == [10, 11, 20, 21]
    columns = torch.tensor([[10.0, 20, 11, 21, 12, 22]])
    assert slice_rank(columns, 1, 2, 3, (1, 2)).tolist() == [[10, 20, 11, 21]]


def test_frozen_components_take_part_without_a_gradient() -> None:
    factor = torch.ones(4, 2, requires_grad=True)
    cut = slice_rank(factor, 0, 3, 4, frozen_below=2)
    assert cut.shape == (3, 2)
    (2 * cut).sum().backward()
    assert factor.grad.tolist() == [[0, 0], [0, 0], [2, 2], [0, 0]]


@pytest.mark.parametrize(
    ("rule", "scale"),
    # alpha 16, r 8, b 2: 16/2, 16/8, 16/sqrt(2), 16/sqrt(16)
    [("alpha/b", 8), ("alpha/r", 2), ("alpha/sqrt(b)", 16 / math.sqrt(2)), ("alpha/sqrt(r*b)", 4)],
)
def test_scales(rule: str, scale: float) -> None:
    assert alpha_at(rule, 16, 2, 8) / 2 == pytest.approx(scale)


def test_every_rule_is_tested_and_agrees_with_lora_at_full_rank_where_it_should() -> None:
    assert set(SCALING_RULES) == {"alpha/b", "alpha/r", "alpha/sqrt(b)", "alpha/sqrt(r*b)"}
    for rule in ("alpha/b", "alpha/r", "alpha/sqrt(r*b)"):
        assert alpha_at(rule, 16, 8, 8) == 16


@pytest.mark.parametrize(
    ("n", "r", "inputs", "outputs"),
    [(1, 4, 10, 7), (3, 4, 10, 7), (1, 8, 3, 9), (1, 8, 20, 2), (2, 1, 5, 5)],  # r above in, r above out, rank 1
)
def test_leading_components_are_the_best_approximation(n: int, r: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, r, inputs, dtype=torch.float64, generator=generator)
    b = torch.randn(n, outputs, r, dtype=torch.float64, generator=generator)
    e, f = leading_components(a, b)
    assert e.dtype == f.dtype == torch.float64
    u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
    for rank in range(1, r + 1):
        kept = min(rank, s.shape[-1])
        best = (u[..., :kept] * s[..., None, :kept]) @ vh[..., :kept, :]
        assert torch.allclose((b @ e[..., :rank]) @ (f[:, :rank] @ a), best, atol=1e-10)


def test_leading_components_by_hand() -> None:
    # A = diag(1, 2), B = diag(3, 1): B A = diag(3, 2), whose leading component is the first
    a, b = torch.diag(torch.tensor([1.0, 2.0]))[None], torch.diag(torch.tensor([3.0, 1.0]))[None]
    e, f = leading_components(a, b)
    assert torch.allclose((b @ e[..., :1]) @ (f[:, :1] @ a), torch.tensor([[[3.0, 0], [0, 0]]]), atol=1e-6)
    # with B = diag(3, 2) the product is diag(3, 4), and the second leads
    b = torch.diag(torch.tensor([3.0, 2.0]))[None]
    e, f = leading_components(a, b)
    assert torch.allclose((b @ e[..., :1]) @ (f[:, :1] @ a), torch.tensor([[[0.0, 0], [0, 4]]]), atol=1e-6)


@pytest.mark.parametrize("zero", ["a", "b"])
def test_a_fresh_adapter_has_a_finite_basis(zero: str) -> None:
    a, b = torch.randn(1, 4, 6), torch.randn(1, 5, 4)
    (a if zero == "a" else b).zero_()
    e, f = leading_components(a, b)
    assert torch.isfinite(e).all()
    assert torch.isfinite(f).all()


def test_draws_are_a_function_of_seed_and_step() -> None:
    weights = rank_weights((1, 2, 4), "uniform", 0.15)
    draws = [draw_rank((1, 2, 4), weights, 7, step) for step in range(50)]
    assert draws == [draw_rank((1, 2, 4), weights, 7, step) for step in range(50)]
    assert draws != [draw_rank((1, 2, 4), weights, 8, step) for step in range(50)]
    assert rank_weights((5,), "mostly_full", 0.15) == (1.0,)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("count", "sampling"),
    [
        *((6, "mostly_full"), (2, "mostly_full"), (4, "uniform"), (2, "uniform"), (8, "geometric"), (3, [1, 2, 97])),
        *((3, [0, 1, 9]), (3, [1, 1, 0]), (2, [3, 4]), (3, [0.0, 0.15, 0.85]), (2, [0.1, 0.9])),
    ],
)
def test_every_window_has_a_lower_rank(seed: int, count: int, sampling: Any) -> None:
    ranks = tuple(2**i for i in range(count))
    weights = rank_weights(ranks, sampling, 0.15)
    draws = [draw_rank(ranks, weights, seed, step) for step in range(4000)]
    window = math.ceil(2 / (1 - weights[-1]) - 1e-9)
    longest = max(len(run) for run in "".join("1" if rank == ranks[-1] else " " for rank in draws).split(" "))
    assert longest < window
    # five standard deviations of independent draws, which these stay within the more easily
    for rank, weight in zip(ranks, weights, strict=True):
        assert abs(draws.count(rank) / 4000 - weight) <= 5 * math.sqrt(weight * (1 - weight) / 4000)
        assert weight > 0 or rank not in draws


def test_weights_that_leave_one_rank() -> None:
    assert {draw_rank((1, 2), (0.0, 1.0), 0, step) for step in range(50)} == {2}
    assert {draw_rank((4,), (1.0,), 0, step) for step in range(50)} == {4}
    assert {draw_rank((1, 2), (1.0, 0.0), 0, step) for step in range(50)} == {1}
