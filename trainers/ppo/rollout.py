"""The rollouts of a PPOTrainer: completions, their rewards, and all that the update needs of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from peft_dynamic.functional import ppo
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.hosts.switch import switched
from peft_dynamic.trainers.ppo.completions import Completions
from peft_dynamic.trainers.ppo.completions import Draw as Draw  # was here before
from peft_dynamic.trainers.ppo.completions import Ends as Ends  # was here before
from peft_dynamic.trainers.ppo.completions import Generator as Generator  # was here before
from peft_dynamic.trainers.ppo.metrics import rollout_metrics, sampling_metrics
from peft_dynamic.trainers.ppo.rollout_func import call
from peft_dynamic.trainers.ppo.scoring import Sequences
from peft_dynamic.trainers.ppo.setup import seed_of
from peft_dynamic.trainers.ppo.sharding import generates, is_sharded


class Begun(NamedTuple):
    """A rollout that waits for the policy's log-probabilities and values.

    Completions, (batch, functions) their rewards, (batch,) the weighted totals, and (batch, width) log-probabilities by
    the reference, or None.
    """

    done: Completions
    by_function: torch.Tensor
    scores: torch.Tensor
    reference: torch.Tensor | None


class Rollouts:
    """Makes the rollouts of a trainer, step by step or whole.

    Args:
        trainer: the `PPOTrainer` with the policy, the settings and the metrics.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def complete(self, prompts: list[Any], sample: bool, seeds: Sequence[int]) -> Completions:
        """Sample completions, with a random state of their own: what else uses the global one makes no difference.

        Args:
            prompts: texts or conversations.
            sample: whether to sample, or to take the likeliest token.
            seeds: numbers that the random state is made of.
        """
        trainer = self.trainer
        function = trainer.rollout_func
        ids = trainer.generator.tokenize(prompts) if function is None else []
        devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
        with evaluating(trainer.model), torch.random.fork_rng(devices), trainer.accelerator.autocast():
            torch.manual_seed(seed_of(*seeds))
            if function is not None:
                trainer.do_sample = sample
                return call(function, prompts, trainer)
            if is_sharded(trainer):
                generates(trainer)
            return trainer.generator(
                trainer.model, trainer.policy, ids, sample, trainer.args.rollout_forward_batch_size
            )

    def judge(self, rows: list[dict[str, Any]], done: Completions, mode: str) -> torch.Tensor:
        """(batch, functions) the rewards; `mode` is "train" or "eval"."""
        trainer = self.trainer
        prompts = [row["prompt"] for row in rows]
        ids = done.completion_ids()
        texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        chat = not isinstance(prompts[0], str)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        skipped = ("prompt", "completion", "completion_ids")
        columns: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0] if key not in skipped}
        columns |= {key: values for key, values in done.fields.items() if key not in skipped}
        columns["trainer_state"] = trainer.state
        columns["log_extra"] = trainer.table.extra
        logged: list[tuple[str, float]] = []
        columns["log_metric"] = lambda name, value: logged.append((name, float(value)))
        rewards = trainer.rewards(prompts, completions, ids, columns, trainer.args.device)
        for name, value in gather_object(logged):  # of all processes, each of which may have logged other names
            trainer.metrics.add(mode, {name: value})
        trainer.table.add(prompts, completions, trainer.rewards.names, rewards)
        return rewards

    def score(self, done: Completions) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, width) log-probabilities by the policy, and (batch, width + 1) values."""
        trainer, width = self.trainer, int(done.lengths.max())
        parts, place = self._parts(done)
        with evaluating(trainer.model), trainer.accelerator.autocast():
            found = [trainer.scorer(trainer.model, batch, width) for batch in parts]
        logprobs, values = zip(*found, strict=True)
        return torch.cat(logprobs)[place], torch.cat(values)[place]

    def reference(self, done: Completions) -> torch.Tensor | None:
        """(batch, width) log-probabilities by the reference policy; None without a KL penalty."""
        trainer, width = self.trainer, int(done.lengths.max())
        if not trainer.args.kl_coef:
            return None
        parts, place = self._parts(done)
        with evaluating(trainer.model), trainer.accelerator.autocast():
            return torch.cat([self._reference(batch, width) for batch in parts])[place]

    def _parts(self, done: Completions) -> tuple[list[Sequences], torch.Tensor]:
        """The completions, as many at a time as are scored, and where each is among them; like lengths together."""
        size = self.trainer.args.rollout_forward_batch_size
        order = torch.argsort(done.prompt_lengths + done.lengths, stable=True)
        parts = [Sequences(done.ids[rows], done.prompt_lengths[rows], done.lengths[rows]) for rows in order.split(size)]
        return parts, torch.argsort(order)

    def _reference(self, batch: Sequences, width: int) -> torch.Tensor:
        trainer = self.trainer
        if trainer.ref_scorer is not None:
            return trainer.ref_scorer(trainer.ref_model, batch, width, values=False)[0]
        reference = switched(trainer.model, trainer.ref_adapter)
        return trainer.scorer(trainer.model, batch, width, values=False, within=reference)[0]

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        return self.trainer.accelerator.reduce(sums, reduction="sum")

    def make(self, rows: list[dict[str, Any]], index: int) -> dict[str, Any]:
        """Complete, judge and score the prompts of one rollout: all that its optimizer steps need."""
        begun = self.begin(rows, index)
        return self.finish(begun, *self.score(begun.done))

    def begin(self, rows: list[dict[str, Any]], index: int) -> Begun:
        """Complete and judge the prompts of one rollout, and ask the reference policy."""
        args = self.trainer.args
        done = self.complete([row["prompt"] for row in rows], True, (args.seed, index, args.process_index))
        by_function = self.judge(rows, done, "train")
        return Begun(done, by_function, self.trainer.rewards.total(by_function), self.reference(done))

    def finish(self, begun: Begun, logprobs: torch.Tensor, values: torch.Tensor) -> dict[str, Any]:
        """Advantages and returns of a rollout, and its metrics.

        Args:
            begun: the completions, their rewards, and what the reference says of them.
            logprobs: (batch, width) of the policy.
            values: (batch, width + 1) of the states.
        """
        trainer, args = self.trainer, self.trainer.args
        done, by_function, scores, reference = begun
        bootstraps = args.bootstrap_truncated and trainer.generator.can_end
        outcome, bootstrap = scores * done.ended if bootstraps else scores, torch.zeros_like(scores)
        if args.missing_eos_penalty is not None:
            outcome = outcome - args.missing_eos_penalty * (~done.ended)
        width = logprobs.shape[1]
        mask = ppo.position_mask(done.lengths, width)
        kl = None if reference is None else ppo.kl_estimate(logprobs, reference, args.kl_estimator)
        rewards = ppo.token_rewards(kl, trainer.kl_coef, outcome, done.lengths, width)
        if args.whiten_rewards:
            rewards = ppo.whiten(rewards, mask, shift_mean=False, total=self.total)
        if bootstraps:
            bootstrap = values.gather(1, done.lengths[:, None])[:, 0] * ~done.ended
        advantages, returns = ppo.advantages_and_returns(
            rewards, values[:, :-1], done.lengths, bootstrap, args.gamma, args.lam
        )
        raw_advantages = advantages
        if args.whiten_advantages:
            advantages = ppo.whiten(advantages, mask, total=self.total)
        trainer.table.set_last("advantage", trainer.accelerator.gather(raw_advantages.sum(1) / done.lengths).tolist())
        measured = rollout_metrics(
            trainer.accelerator, trainer.rewards.names, by_function, scores, done, logprobs, kl, values[:, :-1], returns
        )
        if trainer.rollout_func is not None:
            measured |= sampling_metrics(trainer.accelerator, done.sampled, logprobs)
        if bootstraps and not measured["completions/ended_ratio"]:
            warnings.warn(
                f"bootstrap_truncated=True: no completion of this rollout ended within max_completion_length="
                f"{args.max_completion_length} tokens, so none of its scores is trained on. Give them more tokens or "
                "`stop_strings`, or leave bootstrap_truncated off.",
                stacklevel=2,
            )
        trainer.metrics.add("train", measured | {"kl_coef": trainer.kl_coef})
        if kl is not None and args.kl_target is not None:
            episodes = args.rollout_size * args.world_size
            trainer.kl_coef = ppo.adapt_kl_coef(
                trainer.kl_coef, measured["kl"], args.kl_target, args.kl_horizon, episodes
            )
        return {
            **done.tensors(),
            "logprobs": logprobs,
            "values": values[:, :-1] * mask,
            "advantages": advantages,
            "returns": returns,
        }
