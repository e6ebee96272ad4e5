"""Proximal policy optimization over tokens: penalties, advantages, losses.

A completion of n tokens is an episode of n steps. State t is the prompt with the first t tokens, action t is token t
(from 0), and pi the policy. Masks are made from lengths: what a token is says nothing about whether it is padding.

    (1)  k1_t = log pi(a_t) - log pi_ref(a_t)                                  Schulman's note; Ziegler et al., eq. 2
    (2)  k3_t = exp(-k1_t) - 1 + k1_t                                          Schulman's note
    (3)  r_t  = -beta KL_t, and + score where t = n - 1                        Ziegler et al., eq. 2
    (4)  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                             GAE, eq. 9
    (5)  A_t  = sum_l (gamma lambda)^l delta_{t+l}                             GAE, eq. 16
    (6)  L_t  = -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)             PPO, eq. 7 (a loss, so with a minus)
         with rho_t = pi(a_t) / pi_old(a_t)
    (7)  V_t  = 1/2 max((v - R)^2, (v_clipped - R)^2),  R = A + v_old          PPO, eq. 9, clipped as in its code
    (8)  beta <- beta (1 + e n / horizon),  e = clip(KL / target - 1, -0.2, 0.2)   Ziegler et al., section 2.2

Notable: in (4) the value behind the last token is 0 only if the episode is over. One that was merely cut off may take
V(s_n) there, as for any other time limit (Pardo et al.), but then it must have no score. With both, and gamma = 1, the
target of a value is the next value plus the score: it grows by one score at each step, and diverges.

Sources: Schulman, Wolski, Dhariwal, Radford, Klimov: Proximal Policy Optimization Algorithms, 2017, arXiv 1707.06347.
Schulman, Moritz, Levine, Jordan, Abbeel: High-Dimensional Continuous Control Using Generalized Advantage Estimation,
2016, arXiv 1506.02438. Ziegler et al.: Fine-Tuning Language Models from Human Preferences, 2019, arXiv 1909.08593.
Schulman: Approximating KL Divergence, 2020, joschu.net/blog/kl-approx.html. Pardo, Tavakoli, Levdik, Kormushev: Time
Limits in Reinforcement Learning, 2018, arXiv 1712.00378.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

KL_ESTIMATORS = ("k1", "k3")


def position_mask(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Which places of a right-padded batch are taken.

    Args:
        lengths: (batch,) int, the number of tokens of each row.
        width: places per row.

    Returns:
        (batch, width) bool.
    """
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Estimates KL(pi || pi_ref) from tokens sampled from pi: equations (1) and (2).

    Both are unbiased. k1 may be negative for a token; k3 is never, and varies less.

    Args:
        logprobs: log pi of the tokens, any shape.
        reference: log pi_ref of them, the same shape.
        estimator: "k1" or "k3".

    Returns:
        One estimate per token, the same shape.
    """
    k1 = logprobs - reference
    if estimator == "k1":
        return k1
    if estimator == "k3":
        return torch.expm1(-k1) + k1
    raise ValueError(f"kl_estimator must be one of {KL_ESTIMATORS}, got {estimator!r}.")


def token_rewards(
    kl: torch.Tensor | None, kl_coef: float, scores: torch.Tensor, lengths: torch.Tensor, width: int
) -> torch.Tensor:
    """The reward of each token: equation (3). The score is on the last token of the completion, its EOS if it has one.

    Args:
        kl: (batch, width) estimates, or None for no penalty.
        kl_coef: beta.
        scores: (batch,) of the completions.
        lengths: (batch,) int, at least 1.
        width: places per row.

    Returns:
        (batch, width), 0 behind the completion.
    """
    rewards = torch.zeros(len(scores), width, dtype=scores.dtype, device=scores.device)
    if kl is not None:
        rewards -= kl_coef * kl.to(scores.dtype)
    rewards *= position_mask(lengths, width)
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, lengths - 1] += scores
    return rewards


def advantages_and_returns(
    rewards: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    bootstrap: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation: equations (4) and (5).

    Args:
        rewards: (batch, width).
        values: (batch, width), V(s_t) for t below the length.
        lengths: (batch,) int.
        bootstrap: (batch,) the value behind the last token: V(s_n) of one that was cut off, 0 of one that is over.
        gamma: discount per token.
        lam: lambda, 0 for the one-step advantage and 1 for the Monte Carlo one.

    Returns:
        advantages (batch, width) and returns R = A + V (batch, width), both 0 behind the completion.
    """
    width = rewards.shape[1]
    mask = position_mask(lengths, width)
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = bootstrap, torch.zeros_like(bootstrap)
    for t in reversed(range(width)):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        here = mask[:, t]
        advantages[:, t] = torch.where(here, delta + gamma * lam * next_advantage, 0.0)
        # Behind a row's last token nothing has happened yet, seen from the end
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = advantages[:, t]
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(
    x: torch.Tensor,
    mask: torch.Tensor,
    shift_mean: bool = True,
    total: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """To standard deviation 1 over the places of a mask, and to mean 0 with `shift_mean`.

    Args:
        x: any shape.
        mask: bool, the same shape.
        shift_mean: False keeps the mean.
        total: adds up a tensor of sums over processes, so that all of them count as one batch.

    Returns:
        The same shape, 0 outside of the mask. The variance is the biased one.
    """
    total = total or (lambda sums: sums)
    count, summed = total(torch.stack([mask.sum().to(x.dtype), (x * mask).sum()]))
    mean = summed / count.clamp(min=1)
    variance = total((((x - mean) ** 2) * mask).sum()[None])[0] / count.clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate of each token: equation (6).

    Args:
        logprobs: of the tokens under the policy as it is, any shape.
        old_logprobs: under the policy that sampled them, the same shape.
        advantages: the same shape.
        cliprange: eps.

    Returns:
        losses, the same shape, and whether each is a clipped one, which has no gradient (bool).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(plain, clipped), clipped > plain


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped squared error of each value: equation (7).

    Args:
        values: as they are, any shape.
        old_values: when the completions were sampled, the same shape.
        returns: the same shape.
        cliprange: the most that a value may profit from moving off its old one; infinity to clip nothing.

    Returns:
        losses, the same shape, and whether each is a clipped one, which has no gradient (bool).
    """
    clipped_values = old_values + (values - old_values).clamp(-cliprange, cliprange)
    plain, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for perfect values, 0 for constant ones, NaN if nothing varies.

    Args:
        values: (tokens,).
        returns: (tokens,).
    """
    variance = returns.var(unbiased=False)
    if variance <= 0:
        return float("nan")
    return float(1 - (returns - values).var(unbiased=False) / variance)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The next beta, which moves the measured KL towards its target: equation (8).

    Args:
        kl_coef: beta.
        kl: per completion (the sum over its tokens), averaged over the completions.
        target: of `kl`, above 0.
        horizon: episodes; the smaller, the faster beta moves.
        episodes: completions since the last change.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)
