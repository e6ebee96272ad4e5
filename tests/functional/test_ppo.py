"""The mathematics of PPO, with the arithmetic beside it."""

import math

import pytest
import torch

from peft_dynamic.functional.ppo import (
    adapt_kl_coef,
    advantages_and_returns,
    explained_variance,
    kl_estimate,
    policy_loss,
    position_mask,
    token_rewards,
    value_loss,
    whiten,
)

T = torch.tensor


def test_masks_come_from_lengths() -> None:
    assert position_mask(T([2, 0, 3]), 3).tolist() == [[True, True, False], [False] * 3, [True] * 3]


def test_kl_estimators() -> None:
    logprobs, reference = T([-1.0, -2.0]), T([-1.5, -1.0])
    torch.testing.assert_close(kl_estimate(logprobs, reference, "k1"), T([0.5, -1.0]))
    # exp(-0.5) - 1 + 0.5 = 0.10653, exp(1) - 1 - 1 = 0.71828
    torch.testing.assert_close(kl_estimate(logprobs, reference, "k3"), T([0.10653066, 0.71828183]))
    with pytest.raises(ValueError, match=r"kl_estimator.*'k2'"):
        kl_estimate(logprobs, reference, "k2")


def test_both_kl_estimators_are_unbiased() -> None:
    p, q = torch.softmax(T([0.3, -1.0, 2.0, 0.1]), 0), torch.softmax(T([1.0, 0.5, 0.2, -0.7]), 0)
    exact = (p * (p.log() - q.log())).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), estimator)).sum(), exact)


def test_the_score_is_on_the_last_token_of_each_completion() -> None:
    kl = T([[0.1, 0.2, 9.0], [0.5, 0.4, 0.3]])
    found = token_rewards(kl, 2.0, T([1.0, -1.0]), T([2, 3]), 3)
    # row 0: -2 * 0.1, -2 * 0.2 + 1, nothing behind it; row 1: -2 * 0.5, -2 * 0.4, -2 * 0.3 - 1
    torch.testing.assert_close(found, T([[-0.2, 0.6, 0.0], [-1.0, -0.8, -1.6]]))
    assert token_rewards(None, 2.0, T([1.0]), T([1]), 2).tolist() == [[1.0, 0.0]]


def test_advantages_of_an_episode_that_is_over() -> None:
    rewards, values = T([[0.0, 1.0, 7.0]]), T([[0.5, 0.25, 7.0]])  # the 7s lie behind the completion
    advantages, returns = advantages_and_returns(rewards, values, T([2]), T([0.0]), gamma=0.5, lam=0.8)
    # delta_1 = 1 + 0.5 * 0 - 0.25 = 0.75, delta_0 = 0 + 0.5 * 0.25 - 0.5 = -0.375
    # A_1 = 0.75, A_0 = -0.375 + 0.5 * 0.8 * 0.75 = -0.075
    torch.testing.assert_close(advantages, T([[-0.075, 0.75, 0.0]]))
    torch.testing.assert_close(returns, T([[0.425, 1.0, 0.0]]))


def test_advantages_of_an_episode_that_was_cut_off_take_the_next_value() -> None:
    rewards, values = T([[0.0, 1.0, 7.0]]), T([[0.5, 0.25, 7.0]])
    advantages, _ = advantages_and_returns(rewards, values, T([2]), T([2.0]), gamma=0.5, lam=0.8)
    # delta_1 = 1 + 0.5 * 2 - 0.25 = 1.75, A_0 = -0.375 + 0.4 * 1.75 = 0.325
    torch.testing.assert_close(advantages, T([[0.325, 1.75, 0.0]]))


def test_rows_of_other_lengths_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)
    lengths, bootstrap = T([5, 1, 3]), T([0.0, 1.5, -0.5])
    together = advantages_and_returns(rewards, values, lengths, bootstrap, 0.9, 0.7)
    for row, n in enumerate(lengths.tolist()):
        alone = advantages_and_returns(
            rewards[row : row + 1, :n], values[row : row + 1, :n], T([n]), bootstrap[row : row + 1], 0.9, 0.7
        )
        for many, one in zip(together, alone, strict=True):
            torch.testing.assert_close(many[row, :n], one[0])
            assert not many[row, n:].any()


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_advantages_are_the_sum_of_equation_5(lam: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rewards, values, bootstrap = torch.randn(6, generator=generator), torch.randn(6, generator=generator), 0.3
    gamma = 0.9
    after = torch.cat([values[1:], T([bootstrap])])
    delta = rewards + gamma * after - values
    wanted = [sum((gamma * lam) ** i * delta[t + i] for i in range(6 - t)) for t in range(6)]
    found, _ = advantages_and_returns(rewards[None], values[None], T([6]), T([bootstrap]), gamma, lam)
    torch.testing.assert_close(found[0], torch.stack([T(float(x)) for x in wanted]))


def test_whitening_sees_only_the_mask() -> None:
    x, mask = T([[1.0, 3.0, 100.0]]), T([[True, True, False]])
    # mean 2, variance ((1 - 2)^2 + (3 - 2)^2) / 2 = 1
    torch.testing.assert_close(whiten(x, mask), T([[-1.0, 1.0, 0.0]]))
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), T([[1.0, 3.0, 0.0]]))
    assert whiten(T([5.0, 5.0]), T([True, True])).tolist() == [0.0, 0.0]


def test_whitening_of_parts_with_shared_sums_is_that_of_the_whole() -> None:
    x, mask = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), position_mask(T([5, 2, 3, 1]), 5)
    whole = whiten(x, mask)
    other = T([0.0, 0.0])
    sums: list[torch.Tensor] = []

    def record(part: torch.Tensor) -> torch.Tensor:
        sums.append(part)
        return part

    whiten(x[2:], mask[2:], total=record)
    rest = x[2:][mask[2:]]
    mean = x[mask].mean()
    answers = iter([sums[0], ((rest - mean) ** 2).sum()[None]])
    found = whiten(x[:2], mask[:2], total=lambda part: part + next(answers, other))
    torch.testing.assert_close(found, whole[:2])


def test_policy_loss() -> None:
    ratios, advantages = T([1.5, 0.5, 1.5, 0.5, 1.1]), T([1.0, 1.0, -1.0, -1.0, 2.0])
    losses, clipped = policy_loss(ratios.log(), torch.zeros(5), advantages, 0.2)
    # -min(1.5, 1.2), -min(0.5, 0.8), -min(-1.5, -1.2), -min(-0.5, -0.8), -min(2.2, 2.2)
    torch.testing.assert_close(losses, T([-1.2, -0.5, 1.5, 0.8, -2.2]))
    assert clipped.tolist() == [True, False, False, True, False]


def test_a_clipped_token_has_no_gradient_and_the_first_step_has_the_policy_gradient() -> None:
    logprobs = T([0.5, 0.0]).requires_grad_()
    losses, _ = policy_loss(logprobs, torch.zeros(2), T([1.0, 3.0]), 0.2)
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, -3.0]  # at ratio 1: -A


def test_value_loss() -> None:
    values, old, returns = T([1.0, 0.1, -1.0]), T([0.0, 0.0, 0.0]), T([2.0, 2.0, 2.0])
    losses, clipped = value_loss(values, old, returns, 0.2)
    # clipped values 0.2, 0.1, -0.2; 1/2 max((1-2)^2, (0.2-2)^2) = 1.62; 1/2 1.9^2 = 1.805; 1/2 max(9, 4.84) = 4.5
    torch.testing.assert_close(losses, T([1.62, 1.805, 4.5]))
    assert clipped.tolist() == [True, False, False]
    torch.testing.assert_close(value_loss(values, old, returns, math.inf)[0], T([0.5, 1.805, 4.5]))


def test_explained_variance() -> None:
    returns = T([0.0, 1.0, 2.0])  # variance 2/3
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(T([5.0, 5.0, 5.0]), returns) == pytest.approx(0.0)
    # residuals 0, 0, 1: variance 2/9, so 1 - (2/9) / (2/3) = 2/3
    assert explained_variance(T([0.0, 1.0, 1.0]), returns) == pytest.approx(2 / 3)
    assert math.isnan(explained_variance(returns, T([1.0, 1.0, 1.0])))


def test_the_kl_coefficient_follows_its_target() -> None:
    # 9 / 6 - 1 = 0.5 is clipped to 0.2: 0.1 * (1 + 0.2 * 50 / 100)
    assert adapt_kl_coef(0.1, 9.0, target=6.0, horizon=100, episodes=50) == pytest.approx(0.11)
    assert adapt_kl_coef(0.1, 0.0, target=6.0, horizon=100, episodes=50) == pytest.approx(0.09)
    # 6.6 / 6 - 1 = 0.1
    assert adapt_kl_coef(0.1, 6.6, target=6.0, horizon=100, episodes=50) == pytest.approx(0.105)
