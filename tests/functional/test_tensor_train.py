"""Tensor trains against figures worked out by hand, the published shapes and counts, and a plain einsum."""

import math
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_dynamic.functional.tensor_train import (
    MAX_FACTOR,
    PUBLISHED_SHAPES,
    apply_split,
    can_split,
    check_shape,
    contract,
    contract_batch,
    core_shapes,
    factorize,
    init_cores,
    parameter_count,
    prefers_dense,
    split,
)


def by_einsum(cores: list[torch.Tensor], in_features: int, out_features: int) -> torch.Tensor:
    """All cores in one sum over all inner indices."""
    ranks, factors = string.ascii_uppercase, string.ascii_lowercase
    terms = [f"{ranks[i]}{factors[i]}{ranks[i + 1]}" for i in range(len(cores))]
    result = torch.einsum(f"{','.join(terms)}->{factors[: len(cores)]}", *cores)
    return result.reshape(in_features, out_features)


def cores_of(shape: tuple[int, ...], rank: int, rows: int, columns: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return init_cores(shape, rank, rows, columns, generator, dtype=torch.float64)


def test_a_contraction_by_hand() -> None:
    # k = (2, 3), r = 2: W[i, j] = sum over a of G1[0, i, a] * G2[a, j, 0]
    first = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # G1[0, i, a]
    last = torch.tensor([[[5.0], [6.0], [7.0]], [[8.0], [9.0], [10.0]]])  # G2[a, j, 0]
    # row 0: 1*5+2*8 = 21, 1*6+2*9 = 24, 1*7+2*10 = 27; row 1: 3*5+4*8 = 47, 3*6+4*9 = 54, 3*7+4*10 = 61
    assert contract([first, last], 2, 3).tolist() == [[21, 24, 27], [47, 54, 61]]
    # the same six numbers, row by row, as a (3, 2) and a (1, 6) matrix
    assert contract([first, last], 3, 2).tolist() == [[21, 24], [27, 47], [54, 61]]
    assert contract([first, last], 1, 6).tolist() == [[21, 24, 27, 47, 54, 61]]
    # x = (1, 10): 21 + 470, 24 + 540, 27 + 610
    assert contract_batch(torch.tensor([1.0, 10.0]), [first, last], 2, 3).tolist() == [491, 564, 637]


def test_a_boundary_inside_a_core_by_hand() -> None:
    # k = (4, 1), r = 1: the tensor is 3, 5, 6, 10. Two rows end in the middle of the first factor, 4 = 2 * 2.
    whole, one = torch.tensor([[[3.0], [5.0], [6.0], [10.0]]]), torch.ones(1, 1, 1)
    assert can_split((4, 1), 2)
    left, right = split([whole, one], 2)
    assert left.tolist() == [[3, 5], [6, 10]]
    assert right.tolist() == [[1]]
    # x = (1, 10): 3 + 60, 5 + 100
    assert apply_split(torch.tensor([[1.0, 10.0]]), left, right).tolist() == [[63, 105]]
    assert apply_split(torch.tensor([[1.0, 10.0]]), left, right, torch.tensor([1.0, 2.0])).tolist() == [[64, 107]]
    assert not can_split((2, 2), 4)  # nothing would be left for the columns


@st.composite
def trains(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, int]:
    """A shape, a rank, and any way to read the shape's product as rows times columns."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=5)))
    size = math.prod(shape)
    rows = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    return shape, draw(st.integers(1, 4)), rows, size // rows


@given(trains())
def test_every_way_to_contract_is_the_plain_sum(train: tuple[tuple[int, ...], int, int, int]) -> None:
    shape, rank, rows, columns = train
    cores = [core.requires_grad_() for core in cores_of(shape, rank, rows, columns)]
    expected = by_einsum(cores, rows, columns)
    torch.testing.assert_close(contract(cores, rows, columns), expected)
    x = torch.randn(2, 3, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    result = contract_batch(x, cores, rows, columns)
    torch.testing.assert_close(result, x @ expected)
    if can_split(shape, rows):
        left, right = split(cores, rows)
        torch.testing.assert_close((left.reshape(-1, len(right)) @ right).reshape(rows, columns), expected)
        torch.testing.assert_close(apply_split(x, left, right), x @ expected)
    wanted = torch.autograd.grad((x @ expected).square().sum(), [x, *cores])
    torch.testing.assert_close(torch.autograd.grad(result.square().sum(), [x, *cores]), wanted)


@pytest.mark.parametrize(("rows", "columns"), [(768, 64), (64, 768), (64, 4096), (7, 30), (64, 5120), (2304, 2304)])
def test_real_sizes_contract_to_the_plain_sum(rows: int, columns: int) -> None:
    shape = factorize(rows, columns)
    cores = cores_of(shape, 3, rows, columns)
    matrix = by_einsum(cores, rows, columns)
    x = torch.randn(5, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(contract(cores, rows, columns), matrix)
    torch.testing.assert_close(contract_batch(x, cores, rows, columns), x @ matrix)


def test_published_shapes_are_right_and_come_out() -> None:
    for (large, small), shape in PUBLISHED_SHAPES.items():
        assert math.prod(shape) == large * small
        assert factorize(large, small) == factorize(small, large) == shape
    assert factorize(768, 64) == (8, 8, 12, 8, 8)
    assert factorize(768, 768) == (8, 8, 12, 12, 8, 8)


@given(st.integers(1, 20000), st.integers(1, 20000))
def test_factors_multiply_and_are_small_unless_prime(rows: int, columns: int) -> None:
    shape = factorize(rows, columns)
    assert math.prod(shape) == rows * columns
    assert len(shape) >= 2
    assert shape == factorize(columns, rows)
    for factor in shape:
        assert factor <= MAX_FACTOR or all(factor % divisor for divisor in range(2, math.isqrt(factor) + 1))


@pytest.mark.parametrize(
    ("rows", "columns", "shape"),
    [
        (384, 64, (8, 8, 6, 8, 8)),  # MiniLM: 64 = 8 * 8 at both ends, 384 / 64 = 6 between them
        (576, 64, (8, 8, 9, 8, 8)),  # SmolLM2-135M
        (2048, 64, (8, 8, 8, 4, 8, 8)),
        (3072, 64, (8, 8, 8, 6, 8, 8)),
        (5120, 5120, (10, 8, 8, 8, 8, 8, 8, 10)),
        (30, 7, (6, 5, 7)),  # 7 does not divide 30
        (34, 17, (17, 2, 17)),
        (7, 1, (7, 1)),
        (1, 1, (1, 1)),
    ],
)
def test_computed_shapes(rows: int, columns: int, shape: tuple[int, ...]) -> None:
    assert factorize(rows, columns) == shape


def test_automatic_shapes_can_be_split_both_ways_where_one_side_divides_the_other() -> None:
    for hidden in (384, 512, 576, 640, 896, 1536, 2048, 2560, 3072, 3584, 6144):
        shape = factorize(hidden, 64)
        assert can_split(shape, hidden)
        assert can_split(shape, 64)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="in_features must be an int of at least 1, got 0"):
        factorize(0, 4)
    with pytest.raises(ValueError, match=r"out_features must be an int of at least 1, got 2\.5"):
        factorize(4, 2.5)


def test_counts() -> None:
    assert core_shapes((8, 8, 12), 5) == [(1, 8, 5), (5, 8, 5), (5, 12, 1)]
    # 768 -> 64 at r = 5: 5 * 8 + 25 * (8 + 12 + 8) + 5 * 8 = 780
    assert parameter_count((8, 8, 12, 8, 8), 5) == 780
    # the paper's adapter: two of them and biases of 64 and 768
    assert 2 * parameter_count(factorize(768, 64), 5) + 64 + 768 == 2392
    # rep, 768 -> 8 -> 768: 2 * (5 * 8 + 25 * (8 + 12) + 5 * 8) = 1160
    assert 2 * parameter_count(factorize(768, 8), 5) == 1160
    assert parameter_count((2, 3), 1) == 5


def test_cores_have_the_shapes_dtype_and_generator_asked_for() -> None:
    one = cores_of((2, 3, 4), 2, 6, 4)
    assert [tuple(core.shape) for core in one] == core_shapes((2, 3, 4), 2)
    assert all(core.dtype == torch.float64 and not core.requires_grad for core in one)
    again = cores_of((2, 3, 4), 2, 6, 4)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert init_cores((2, 3), 1, 2, 3, device="meta")[0].is_meta


@pytest.mark.parametrize(("shape", "rank", "rows", "columns"), [((8, 8, 12), 4, 48, 16), ((4, 6, 5, 4), 3, 20, 24)])
def test_entries_have_glorots_deviation(shape: tuple[int, ...], rank: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [contract(init_cores(shape, rank, rows, columns, generator), rows, columns) for _ in range(400)]
    )
    # Entries of one draw share cores, so the draws are what is counted: the mean of 400 sums of squares is within 10%.
    assert draws.square().mean().sqrt().item() == pytest.approx((rows + columns) ** -0.5, rel=0.1)
    assert abs(draws.mean().item()) < 0.02 * (rows + columns) ** -0.5


def test_the_thin_matrices_win_at_any_number_of_tokens_for_published_adapters() -> None:
    for rows, columns, rank in ((768, 64, 5), (64, 768, 5), (4096, 64, 8), (64, 4096, 8), (768, 768, 20)):
        shape = factorize(rows, columns)
        assert not any(prefers_dense(tokens, shape, rank, rows, columns) for tokens in (1, 64, 4096, 10**6))
    # (in + out) * r = 128 * 64 multiplications a token for the thin matrices, 64 * 64 for the dense one
    assert prefers_dense(10**6, (8, 8, 8, 8), 64, 64, 64)
    assert prefers_dense(1, (8, 12), 2, 32, 3)  # 32 rows end nowhere in 8 x 12


def test_the_count_of_multiplications_by_hand() -> None:
    # k = (4, 4), r = 1, a (4, 4) matrix: dense builds 16 and applies 16 a token; thin applies 4 + 4 a token
    assert not prefers_dense(1, (4, 4), 1, 4, 4)
    # r = 4: dense builds 64 and applies 16 a token; thin applies 16 + 16 a token; they meet at 4 tokens
    assert not prefers_dense(4, (4, 4), 4, 4, 4)
    assert prefers_dense(5, (4, 4), 4, 4, 4)


@pytest.mark.parametrize(
    ("shape", "rank", "message"),
    [
        ((48,), 1, r"tensor_shape must be a list of at least two ints, got \(48,\)\. Pass for example \["),
        ("68", 1, "tensor_shape must be a list of at least two ints, got '68'"),
        ((6, 8.0), 1, "tensor_shape must be a list of at least two ints"),
        ((6, 0, 8), 1, r"factors of tensor_shape must be at least 1, got \[6, 0, 8\]"),
        ((6, 7), 1, r"must multiply to 12 x 4 = 48, got \[6, 7\] with a product of 42\. Pass for example \["),
        ((6, 8), 0, "tensor_rank must be an int of at least 1, got 0"),
        ((6, 8), True, "tensor_rank must be an int of at least 1, got True"),
        # between (2, 4) and (6): min(8, 6) = 6; between (2) and (4, 6): min(2, 24) = 2
        ((2, 4, 6), 7, r"tensor_rank=7 is above 6, the largest .* \[2, 4, 6\] .* Lower tensor_rank to 6 or less"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_shape(shape, 12, 4, rank)


def test_a_rank_above_the_bound_at_the_ends_only_is_allowed() -> None:
    check_shape((2, 4, 6), 12, 4, 6)
    check_shape((8, 8, 12, 8, 8), 768, 64, 20)


def test_a_train_that_cannot_be_split_says_so() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 2\] cannot be divided after 4 rows; use contract"):
        split(cores_of((2, 2), 1, 4, 1), 4)
