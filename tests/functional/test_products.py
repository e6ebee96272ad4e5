import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_dynamic.functional.products import allocate, cut, pooled, singular_values, weighted_sum
from peft_dynamic.functional.ranks import gram_matrices

T = torch.tensor


def pair(seed: int, rank: int = 4, inputs: int = 7, outputs: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, inputs, generator=generator, dtype=torch.float64),
        torch.randn(outputs, rank, generator=generator, dtype=torch.float64),
    )


def test_a_cut_by_hand() -> None:
    a, b = torch.eye(2), torch.diag(torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(singular_values(a, b), T([2.0, 1.0], dtype=torch.float64))
    cut_a, cut_b = cut(a, b, 1)
    torch.testing.assert_close(cut_b @ cut_a, torch.diag(torch.tensor([2.0, 0.0])))


def test_a_sum_by_hand() -> None:
    """(1 0) and (0 1) with B of 1 and 3, weights one half: (0.5, 1.5). The mean of the factors would give (1, 1)."""
    one, other = (T([[1.0, 0.0]]), T([[1.0]])), (T([[0.0, 1.0]]), T([[3.0]]))
    a, b = weighted_sum([one, other], [0.5, 0.5])
    assert (b @ a).tolist() == [[0.5, 1.5]]
    mean_of_factors = (one[1] + other[1]) / 2 @ ((one[0] + other[0]) / 2)
    assert mean_of_factors.tolist() == [[1.0, 1.0]]


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_the_error_of_a_cut_is_the_tail_of_the_spectrum(seed: int, rank: int) -> None:
    a, b = pair(seed)
    values = singular_values(a, b)
    torch.testing.assert_close(values, torch.linalg.svdvals(b @ a)[:4])
    cut_a, cut_b = cut(a, b, rank)
    assert (cut_a.shape, cut_b.shape) == ((rank, 7), (6, rank))
    error = torch.linalg.matrix_norm(b @ a - cut_b @ cut_a)
    torch.testing.assert_close(error, values[rank:].square().sum().sqrt(), atol=1e-9, rtol=1e-7)


def test_dependent_rows_and_zeros_have_a_spectrum() -> None:
    a, b = pair(1)
    a[3] = a[2]
    torch.testing.assert_close(singular_values(a, b), torch.linalg.svdvals(b @ a)[:4], atol=1e-6, rtol=1e-6)
    assert singular_values(torch.zeros(2, 3), torch.zeros(4, 2)).tolist() == [0.0, 0.0]


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_a_smaller_budget_s_ranks_are_within_a_larger_one_s(rows: list[list[float]], one: int, other: int) -> None:
    values = {str(i): sorted(row, reverse=True) for i, row in enumerate(rows)}
    costs = {name: 3 + int(name) for name in values}
    small, large = (allocate(values, costs, budget) for budget in sorted((one, other)))
    assert all(small[name] <= large[name] <= len(values[name]) for name in values)
    assert sum(costs[name] * rank for name, rank in large.items()) <= max(one, other)


def test_components_are_taken_by_worth_over_cost() -> None:
    values, costs = {"wide": [3.0, 1.0], "narrow": [2.0, 2.0]}, {"wide": 9, "narrow": 2}
    # worth over cost: wide 1 and 1/9, narrow 2 and 2
    expected = {2: (0, 1), 4: (0, 2), 12: (0, 2), 13: (1, 2), 22: (2, 2)}
    for budget, (wide, narrow) in expected.items():
        assert allocate(values, costs, budget) == {"wide": wide, "narrow": narrow}
    taken = [sum(allocate(values, costs, budget).values()) for budget in range(30)]
    assert all(before <= after for before, after in itertools.pairwise(taken))


def test_a_calibrated_cut_by_hand() -> None:
    """A = I, B = diag(2, 1), E[z z^T] = diag(1, 9): weighted, the singular values are 2 and 3; rank 1 is diag(0, 1)."""
    a, b, inputs = torch.eye(2), torch.diag(T([2.0, 1.0])), torch.diag(T([1.0, 9.0]))
    torch.testing.assert_close(singular_values(a, b, (inputs, None), 0.0), T([3.0, 2.0], dtype=torch.float64))
    cut_a, cut_b = cut(a, b, 1, (inputs, None), 0.0)
    torch.testing.assert_close(cut_b @ cut_a, torch.diag(T([0.0, 1.0])))
    for damping in (1e6, 1e9):  # the plain cut
        cut_a, cut_b = cut(a, b, 1, (inputs, None), damping)
        torch.testing.assert_close(cut_b @ cut_a, torch.diag(T([2.0, 0.0])), atol=1e-4, rtol=1e-4)


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_the_weighted_error_is_the_tail_of_the_weighted_spectrum(seed: int, rank: int) -> None:
    a, b = pair(seed)
    x, g = pair(seed + 1, 30, 7)[0], pair(seed + 2, 25, 6)[0]
    c, w = x.mT @ x / 30, g.mT @ g / 25
    moments = (a @ c @ a.mT, b.mT @ w @ b)
    values = singular_values(a, b, moments, 0.0)
    cut_a, cut_b = cut(a, b, rank, moments, 0.0)
    error = b @ a - cut_b @ cut_a
    squared = torch.trace(w @ error @ c @ error.mT)
    torch.testing.assert_close(squared, values[rank:].square().sum(), atol=1e-8, rtol=1e-6)
    plain = b @ a - (lambda pair: pair[1] @ pair[0])(cut(a, b, rank))
    assert squared <= torch.trace(w @ plain @ c @ plain.mT) + 1e-8


def test_the_moments_of_white_data_give_today_s_cut_to_the_bit() -> None:
    a, b = pair(3)
    gram_a, gram_b = gram_matrices(a[None], b[None])
    for found, expected in zip(cut(a, b, 2, (gram_a[0], gram_b[0]), 0.0), cut(a, b, 2), strict=True):
        assert torch.equal(found, expected)


def test_a_component_s_worth_is_the_square_of_its_value() -> None:
    """9 / 4 for the wide layer's, 1 for the narrow one's; by the values themselves it would be 3 / 4 and 1."""
    values, costs = {"wide": [3.0], "narrow": [1.0]}, {"wide": 4, "narrow": 1}
    assert allocate(values, costs, 4) == {"wide": 1, "narrow": 0}


def covariance(a: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """C_t of equation (6), dense: the moments in A's rows, white at their mean level in all other directions."""
    inverse = torch.linalg.pinv(a)
    level = moment.trace() / a.square().sum()
    return inverse @ moment @ inverse.mT + level * (torch.eye(a.shape[1]).to(a) - inverse @ a)


def test_pooled_moments_by_hand() -> None:
    """A_1 = I sees diag(1, 9); A_2 = (1 0) sees 4, and is taken to see 4 elsewhere. The mean is diag(2.5, 6.5)."""
    found = pooled([torch.eye(2), T([[1.0, 0.0]])], [torch.diag(T([1.0, 9.0])), T([[4.0]])])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), T([[2.5, 0.0, 2.5], [0.0, 6.5, 0.0], [2.5, 0.0, 2.5]]))


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_a_cut_by_pooled_moments_is_the_best_in_their_norm(seed: int, rank: int) -> None:
    pairs = [pair(seed, rank=2, inputs=7), pair(seed + 1, rank=3, inputs=7)]
    data = [pair(seed + 2 + t, 30, 7)[0] for t in (0, 1)]
    moments = [a @ x.mT @ x @ a.mT / 30 for (a, _), x in zip(pairs, data, strict=True)]
    a, b = weighted_sum(pairs, [0.7, -2.0])
    wanted = sum(covariance(a_t, moment) for (a_t, _), moment in zip(pairs, moments, strict=True)) / 2
    found = pooled([a_t for a_t, _ in pairs], moments)
    torch.testing.assert_close(found, a @ wanted @ a.mT, atol=1e-8, rtol=1e-7)
    cut_a, cut_b = cut(a, b, rank, (found, None), 0.0)
    root = torch.linalg.cholesky(wanted)
    values = torch.linalg.svdvals(b @ a @ root)
    error = torch.linalg.matrix_norm((b @ a - cut_b @ cut_a) @ root)
    torch.testing.assert_close(error, values[rank:].square().sum().sqrt(), atol=1e-7, rtol=1e-6)


def test_pooled_moments_of_one_row_space_are_exact() -> None:
    """Adapters that share A, as from one start: the mean of what each sees of its data is all there is to know."""
    a, _ = pair(1, rank=3, inputs=7)
    turned = pair(2, rank=3, inputs=3)[0] @ a  # other rows of the same space
    data = [pair(3 + t, 30, 7)[0] for t in (0, 1)]
    true = sum(x.mT @ x / 30 for x in data) / 2
    moments = [each @ (x.mT @ x / 30) @ each.mT for each, x in zip((a, turned), data, strict=True)]
    stack = torch.cat([a, turned])
    torch.testing.assert_close(pooled([a, turned], moments), stack @ true @ stack.mT, atol=1e-9, rtol=1e-7)


def test_equal_adapters_lose_nothing_at_their_own_rank() -> None:
    a, b = pair(5, rank=3)
    x = pair(6, 30, 7)[0]
    moment = a @ x.mT @ x @ a.mT / 30
    stacked = weighted_sum([(a, b), (a, b)], [1.0, 0.5])
    cut_a, cut_b = cut(*stacked, 3, (pooled([a, a], [moment, moment]), None), 0.0)
    torch.testing.assert_close(cut_b @ cut_a, 1.5 * b @ a, atol=1e-9, rtol=1e-7)


def test_a_component_that_is_not_there_has_a_singular_value_of_0() -> None:
    """Six components into five outputs: the sixth is rounding, another on each CPU, and no budget takes it."""
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(6, 16, generator=generator), torch.randn(5, 6, generator=generator)
    values = singular_values(a, b)
    assert values[5] == 0
    torch.testing.assert_close(values[:5], torch.linalg.svdvals((b @ a).double()), rtol=1e-5, atol=0)
    assert allocate({"x": values.tolist()}, {"x": 21}, 1000) == {"x": 5}
