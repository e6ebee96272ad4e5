"""PPOTrainer from the prompts to the weights, on a tiny policy."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    TrainerCallback,
    set_seed,
)

from peft_dynamic.functional import ppo
from peft_dynamic.trainers.ppo.completions import Completions
from tests.trainers.ppo.common import EOS, tiny_policy, trainer

T = torch.tensor


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **(tolerance or {"rtol": 0.0, "atol": 0.0}), msg=name)


# ---- The rollout. Three completions, made up: one that ends, one that ends with its last token, one that is cut off.
# Their padding is the EOS token too.
DONE = Completions(
    ids=T([[0, 1, EOS, EOS, EOS], [2, 3, 4, 5, EOS], [6, 7, 8, 9, 9]]),
    prompt_lengths=T([1, 1, 2]),
    lengths=T([2, 4, 3]),
    ended=T([True, True, False]),
)
SCORES = [1.0, 2.0, 4.0]


def rolled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: float = 0.0, **settings: Any) -> dict[str, Any]:
    """The rollout of DONE without discount, whitening and, unless told otherwise, KL; all values the same."""
    defaults = {"lam": 1.0, "gamma": 0.5, "whiten_advantages": False, "kl_coef": 0.0, "per_device_train_batch_size": 3}
    made = trainer(tmp_path, reward_funcs=lambda **_: SCORES, **(defaults | settings))
    made.value_function.head.bias.data.fill_(values)
    monkeypatch.setattr(made.rollouts, "complete", lambda *_: DONE)
    return made.rollouts.make([{"prompt": "a"}] * 3, 0) | {"trainer": made}


def test_the_score_is_on_the_eos_token_not_on_the_padding_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rolled_out(tmp_path, monkeypatch)
    # discounted by 1/2 per token from the last one, and nothing behind it although that is EOS as well
    torch.testing.assert_close(found["returns"], T([[0.5, 1.0, 0.0, 0.0], [0.25, 0.5, 1.0, 2.0], [1.0, 2.0, 4.0, 0.0]]))
    torch.testing.assert_close(found["advantages"], found["returns"])


def test_missing_eos_penalty_goes_by_what_ended_the_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rolled_out(tmp_path, monkeypatch, missing_eos_penalty=3.0, stop_token_id=5, gamma=1.0)
    torch.testing.assert_close(found["returns"][:, 0], T([1.0, 2.0, 1.0]))  # 4 - 3 for the one that was cut off


def test_the_stop_token_spares_the_penalty_and_eos_is_then_a_token_like_any(tmp_path: Path) -> None:
    ends: list[list[int]] = []

    def record(completion_ids: list[list[int]], **_: Any) -> list[float]:
        ends.extend(completion_ids)
        return [0.0] * len(completion_ids)

    made = trainer(tmp_path, reward_funcs=record, stop_token_id=3, missing_eos_penalty=1.0, num_ppo_epochs=1, lam=1.0)
    made.args.whiten_advantages, made.kl_coef, made.args.kl_coef = False, 0.0, 0.0
    for index in range(8):
        found = made.rollouts.make([{"prompt": "a"}] * 4, index)
        stopped = [ids[-1] == 3 for ids in ends[-4:]]
        torch.testing.assert_close(found["returns"][:, 0], T([0.0 if yes else -1.0 for yes in stopped]))
    assert sum(ids[-1] == 3 for ids in ends) > 2
    assert any(EOS in ids[:-1] for ids in ends)
    assert not any(3 in ids[:-1] for ids in ends)


def test_a_cut_is_the_end_or_takes_the_next_value_in_place_of_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = rolled_out(tmp_path, monkeypatch, values=3.0)
    unfinished = rolled_out(tmp_path, monkeypatch, values=3.0, bootstrap_truncated=True)
    # gamma 1/2, lambda 1: the discounted score, 4 on the last token; or gamma V = 3/2 there and no score
    torch.testing.assert_close(over["returns"][2], T([1.0, 2.0, 4.0, 0.0]))
    torch.testing.assert_close(unfinished["returns"][2], T([0.375, 0.75, 1.5, 0.0]))
    torch.testing.assert_close(over["returns"][:2], unfinished["returns"][:2])  # those ended
    fixed = rolled_out(tmp_path, monkeypatch, values=3.0, bootstrap_truncated=True, stop_token=None)
    torch.testing.assert_close(fixed["returns"], over["returns"])  # nothing can end but by the length


def test_a_rollout_of_which_nothing_is_trained_on_says_so(tmp_path: Path) -> None:
    made = trainer(tmp_path, tiny_policy(), bootstrap_truncated=True, max_completion_length=1)
    with pytest.warns(UserWarning, match="within max_completion_length=1 tokens, so none of its scores is trained on"):
        made.rollouts.make([{"prompt": "ab"}] * 4, 0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_kl_penalty_is_that_of_each_token_to_the_policy_without_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_policy(), lora(init_lora_weights=False))
    settings = {"model": model, "kl_coef": 0.25, "kl_estimator": estimator, "temperature": 0.7}
    found = rolled_out(tmp_path, monkeypatch, gamma=0.0, **settings)

    def logprobs(row: int) -> torch.Tensor:
        prompt, n = int(DONE.prompt_lengths[row]), int(DONE.lengths[row])
        ids = DONE.ids[row, : prompt + n]
        logits = model(ids[None]).logits[0] / 0.7
        return torch.log_softmax(logits, 1)[torch.arange(prompt - 1, prompt - 1 + n), ids[prompt:]].detach()

    for row, n in enumerate(DONE.lengths.tolist()):
        with_adapter = logprobs(row)
        with model.disable_adapter():
            without = logprobs(row)
        wanted = -0.25 * ppo.kl_estimate(with_adapter, without, estimator)
        wanted[-1] += SCORES[row]
        torch.testing.assert_close(found["returns"][row, :n], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["logprobs"][row, :n], with_adapter, rtol=1e-4, atol=1e-5)


def test_rewards_are_whitened_by_their_scale_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rolled_out(tmp_path, monkeypatch, whiten_rewards=True, gamma=0.0)
    mask = ppo.position_mask(DONE.lengths, 4)
    plain = T([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 4.0, 0.0]])
    mean, spread = plain[mask].mean(), plain[mask].std(unbiased=False)
    torch.testing.assert_close(found["returns"][mask], (plain[mask] - mean) / spread + mean)


def test_rollouts_do_not_depend_on_who_else_draws_random_numbers(tmp_path: Path) -> None:
    seen: list[list[str]] = [[], []]
    for run in range(2):

        def reward(completions: list[str], run: int = run, **_: Any) -> list[float]:
            seen[run] += completions
            torch.rand(run + 1)
            random.random()
            return [1.0] * len(completions)

        trainer(tmp_path, reward_funcs=reward, max_steps=8).train()
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 4


# ---- The update


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step, and its name's events."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}
        self.events: list[str] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.found:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gradients_of(tmp_path: Path, **settings: Any) -> dict[str, torch.Tensor]:
    callback = Gradients()
    settings = {"max_grad_norm": 0.0, "max_steps": 1, "callbacks": [callback]} | settings
    trainer(tmp_path, **settings).train()
    return callback.found


def test_the_first_gradient_is_the_one_of_a_plain_computation(tmp_path: Path) -> None:
    model = get_peft_model(tiny_policy(), lora())
    made = trainer(tmp_path, model=model, kl_coef=0.0, vf_coef=0.3, max_grad_norm=0.0, max_steps=1)
    made.value_function.head.weight.data.copy_(torch.linspace(-1, 1, 32)[None])
    callback = Gradients()
    made.add_callback(callback)
    rollouts: list[dict[str, torch.Tensor]] = []
    real = made.rollouts.finish
    made.rollouts.finish = lambda *args: rollouts.append(real(*args)) or rollouts[-1]  # type: ignore[method-assign]  # of one trainer
    made.train()

    plain = get_peft_model(tiny_policy(), lora())
    head = torch.linspace(-1, 1, 32).requires_grad_()
    rollout, losses, tokens = rollouts[0], [], int(rollouts[0]["lengths"].sum())
    for row, n in enumerate(rollout["lengths"].tolist()):
        prompt = int(rollout["prompt_lengths"][row])
        ids = rollout["ids"][row, : prompt + n]
        out = plain(ids[None], output_hidden_states=True)
        places = torch.arange(prompt - 1, prompt - 1 + n)
        logprobs = torch.log_softmax(out.logits[0], 1)[places, ids[prompt:]]
        values = out.hidden_states[-1][0, places] @ head
        advantages, returns = rollout["advantages"][row, :n], rollout["returns"][row, :n]
        losses.append((-advantages * (logprobs - logprobs.detach()).exp()).sum())
        losses.append(0.3 * 0.5 * ((values - returns) ** 2).sum())
    (sum(losses) / tokens).backward()
    found = callback.found
    value = next(name for name in found if name.endswith("head.weight"))
    torch.testing.assert_close(found.pop(value)[0], head.grad, rtol=1e-4, atol=1e-5)
    found.pop(value.replace("weight", "bias"))
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert any(g.abs().max() > 1e-4 for g in wanted.values())
    assert_same(found, wanted, rtol=1e-3, atol=1e-6)


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    whole = gradients_of(tmp_path, per_device_train_batch_size=4, peft_config=lora())
    parts = gradients_of(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, peft_config=lora())
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-2
    assert_same(whole, parts, rtol=1e-3, atol=1e-6)


def test_mini_batches_and_epochs_go_over_each_completion_once_per_epoch(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_mini_batches=2, num_ppo_epochs=3
    )
    assert (made.args.rollout_size, made.args.steps_per_rollout) == (8, 12)
    rows = [{"prompt": "a" * (1 + i)} for i in range(8)]
    steps = [made._prepare_inputs(rows) for _ in range(12)]
    orders = []
    for epoch in range(3):
        mine = steps[4 * epoch : 4 * epoch + 4]
        orders.append([length for step in mine for length in step["prompt_lengths"].tolist()])
        assert sorted(orders[-1]) == list(range(1, 9))
        for first, second in ((0, 1), (2, 3)):  # the two micro-batches of an optimizer step share its tokens
            tokens = mine[first]["lengths"].sum() + mine[second]["lengths"].sum()
            assert mine[first]["tokens"] == mine[second]["tokens"] == tokens
    assert orders[0] != orders[1] != orders[2]


def test_the_first_pass_has_ratio_one_and_a_later_one_is_clipped(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=4, peft_config=lora(lora_dropout=0.5), learning_rate=0.1, max_grad_norm=0.0)
    made.train()
    first, *later = (entry for entry in made.state.log_history if "approx_kl" in entry)
    assert first["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert first["clip_ratio"] == 0.0
    assert max(entry["approx_kl"] for entry in later) > 1e-3
    assert max(entry["clip_ratio"] for entry in later) > 0.1
    assert first["loss"] == pytest.approx(first["loss/policy"] + 0.1 * first["loss/value"], abs=1e-6)


@pytest.mark.parametrize("family", ["OPT", "BLOOM", "GPT-2"])
def test_the_models_own_dropouts_are_off_too(tmp_path: Path, family: str) -> None:
    """OPT and BLOOM keep theirs as numbers, GPT-2 as modules."""
    tokens = {"vocab_size": 17, "eos_token_id": EOS, "pad_token_id": EOS, "bos_token_id": None}
    make: dict[str, Callable[..., Any]] = {
        "OPT": lambda p: OPTForCausalLM(
            OPTConfig(
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                dropout=p,
                attention_dropout=p,
                **tokens,
            )
        ),
        "BLOOM": lambda p: BloomForCausalLM(
            BloomConfig(hidden_size=32, n_layer=2, n_head=4, hidden_dropout=p, attention_dropout=p, **tokens)
        ),
        "GPT-2": lambda p: GPT2LMHeadModel(
            GPT2Config(
                n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=p, resid_pdrop=p, embd_pdrop=p, **tokens
            )
        ),
    }
    set_seed(0)
    made = trainer(tmp_path, make[family](0.5), max_steps=1, num_ppo_epochs=1)
    made.train()
    assert made.state.log_history[0]["approx_kl"] == pytest.approx(0.0, abs=1e-9)


def test_a_policy_without_gradients_stops_training(tmp_path: Path) -> None:
    made = trainer(tmp_path, peft_config=lora())
    real = made.compute_loss

    def detached(*args: Any, **kwargs: Any) -> torch.Tensor:
        return real(*args, **kwargs).detach() + made.value_function.head.bias.sum()

    made.compute_loss = detached  # type: ignore[method-assign]  # of one trainer
    with pytest.raises(RuntimeError, match="None of the policy's 28 trained parameters has a gradient"):
        made.train()


# ---- Learning


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_what_only_the_best_behaviour_is_paid_for(tmp_path: Path, seed: int) -> None:
    """Say the letter behind the prompt's: chance does once in 17 times, and nothing else is worth anything."""

    def reward(completions: list[str], wanted: list[str], **_: Any) -> list[float]:
        return [float(said == right) for said, right in zip(completions, wanted, strict=True)]

    rows = Dataset.from_list([{"prompt": "a", "wanted": "b"}, {"prompt": "b", "wanted": "c"}])
    made = trainer(
        tmp_path,
        tiny_policy(seed=seed, initializer_range=0.1),
        reward,
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=lora(),
        per_device_train_batch_size=64,
        max_steps=80,
        max_completion_length=1,
        kl_coef=0.01,
        seed=seed,
    )
    made.train()
    rewards = [entry["reward"] for entry in made.state.log_history if "reward" in entry]
    assert rewards[0] < 0.2 < 0.4 < max(rewards)  # sampled, by a policy whose frozen head cannot get sharp
    assert made.evaluate()["eval_reward"] == 1.0
