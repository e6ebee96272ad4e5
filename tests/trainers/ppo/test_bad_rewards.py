"""Rewards, columns and seeds that would train something else: refused by name before an update."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import OPTConfig, OPTForCausalLM

from peft_dynamic.trainers.ppo.rewards import Rewards
from peft_dynamic.trainers.ppo.setup import seed_of
from tests.trainers.ppo.common import EOS, prompts, tiny_policy, trainer, weights

CPU = torch.device("cpu")


def reward(returned: Any) -> torch.Tensor:
    def my_reward(**columns: Any) -> Any:
        return returned

    texts = ["a", "b"]
    return Rewards(my_reward)(texts, texts, [[1], [2]], {}, CPU)


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5],
        (1, 0.5),
        np.array([1, 0.5]),
        torch.tensor([1, 0.5]),
        [np.float32(1), np.float16(0.5)],
        [torch.tensor(1.0), torch.tensor([0.5])],
        [True, 0.5],
        [np.bool_(True), 0.5],
        {"first": 1, "second": 0.5}.values(),
    ],
    ids=repr,
)
def test_numbers_in_every_form_are_taken(returned: Any) -> None:
    assert reward(returned).tolist() == [[1.0], [0.5]]


@pytest.mark.parametrize(
    "returned",
    [
        {0: 1.0, 1: 2.0},
        {"a": 1.0, "b": 2.0},
        {1.0, 2.0},
        "12",
        b"12",
        ["1.0", "2.0"],
        [[1.0], [2.0]],
        np.ones((2, 1)),
        torch.ones(2, 1),
        torch.ones(2, 2),
        [1.0],
        [1.0, 2.0, 3.0],
        torch.tensor(1.0),
        3.0,
        None,
        [{}, {}],
        [1.0, 1j],
        [float("nan"), 1.0],
        [1.0, float("inf")],
        [1.0, 1e20],
        [1.0, -1e39],
        [10**400, 1.0],
    ],
    ids=repr,
)
def test_what_is_no_reward_names_the_function(returned: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="The reward function 'my_reward' returned"):
        reward(returned)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e30, "1", True])
def test_weights_are_numbers(weight: Any) -> None:
    with pytest.raises(ValueError, match="reward_weights="):
        Rewards([len, len], weights=[weight, 1.0])


@pytest.mark.parametrize("value", [1e20, 1e39, -1e20])
def test_one_huge_reward_changes_and_saves_nothing(tmp_path: Path, value: float) -> None:
    calls = []

    def sometimes_huge(completions: list[str], **columns: Any) -> list[float]:
        calls.append(1)
        return [value if len(calls) == 2 and i == 0 else 1.0 for i, _ in enumerate(completions)]

    policy = tiny_policy()
    made = trainer(tmp_path, policy, sometimes_huge, save_strategy="steps", save_steps=1, max_steps=12)
    with pytest.raises(ValueError, match=r"The reward function 'sometimes_huge' returned .* for the completion"):
        made.train()
    assert all(p.isfinite().all() for p in policy.parameters())
    assert all(p.isfinite().all() for p in made.value_function.parameters())


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    policy = tiny_policy()
    made = trainer(tmp_path, policy, save_strategy="steps", save_steps=1, max_steps=8)
    before: dict[str, torch.Tensor] = {}
    real = made.compute_loss

    def broken(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = real(model, inputs, *args, **kwargs)
        if made.state.global_step == 2:
            before.update(weights(policy))
            return loss * float("inf")
        return loss

    made.compute_loss = broken
    with pytest.raises(FloatingPointError, match=r"The loss of step 3 is .*Nothing was updated"):
        made.train()
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert not (tmp_path / "checkpoint-3").exists()


@pytest.mark.parametrize("column", ["prompts", "completions", "trainer_state", "log_extra", "log_metric"])
def test_a_column_named_like_an_argument_is_refused(tmp_path: Path, column: str) -> None:
    data = prompts().add_column(column, ["x"] * 8)
    message = rf"has a column `{column}`, which PPOTrainer passes .* Rename it"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, train_dataset=data)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, eval_dataset=data).evaluate()


def test_a_completion_of_the_dataset_is_not_the_policys(tmp_path: Path) -> None:
    """As in GRPOTrainer: rows of supervised data may be prompts as they are."""
    data = prompts().add_column("completion", ["never"] * 8).add_column("completion_ids", [[1]] * 8)
    seen = []

    def look(completions: list[str], completion_ids: list[Any], **columns: Any) -> list[float]:
        assert "completion" not in columns
        seen.extend(completions)
        return [0.0] * len(completions)

    trainer(tmp_path, reward_funcs=look, train_dataset=data, max_steps=4).train()
    assert seen
    assert "never" not in seen


def test_seeds_differ_and_are_the_same_everywhere() -> None:
    parts = [(a, b, c) for a in range(-4, 4) for b in range(-4, 4) for c in range(3)]
    assert len({seed_of(*part) for part in parts}) == len(parts)
    assert all(0 <= seed_of(*part) < 2**63 for part in parts)
    assert seed_of(0, -1, 0) != seed_of(0, -2, 0)  # for which `hash` is the same


def test_batches_of_an_evaluation_are_sampled_apart(tmp_path: Path) -> None:
    same = Dataset.from_list([{"prompt": "abc"} for _ in range(12)])
    seen: list[list[str]] = []

    def look(completions: list[str], **columns: Any) -> list[float]:
        seen.append(completions)
        return [0.0] * len(completions)

    made = trainer(tmp_path, reward_funcs=look, eval_dataset=same, per_device_eval_batch_size=4, eval_do_sample=True)
    made.evaluate()
    assert len(seen) == 3
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_an_opt_whose_states_are_projected_before_the_head(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=17,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=EOS,
        pad_token_id=EOS,
        bos_token_id=None,
        do_layer_norm_before=False,
    )
    torch.manual_seed(0)
    policy = OPTForCausalLM(config)
    before = weights(policy)
    made = trainer(tmp_path, policy, max_steps=4)
    made.train()
    assert made.value_function.head.weight.shape == (1, 16)
    assert any(not torch.equal(p, before[name]) for name, p in policy.named_parameters())
