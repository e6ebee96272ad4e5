"""One pass for the old log-probabilities and for the first update: the same training, a forward pass less."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from torch import nn

from peft_dynamic import DyLoRAConfig
from tests.trainers.ppo.common import prompts, tiny_policy, trainer

TASK = {"task_type": "CAUSAL_LM"}


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", **TASK, **settings)


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_the_updates_are_those_of_two_passes(tmp_path: Path, adapter: bool) -> None:
    found, logs, passes = [], [], []
    for shares in (True, False):
        settings = {"num_ppo_epochs": 2, "max_steps": 6, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
        settings |= {"peft_config": lora()} if adapter else {}
        made = trainer(tmp_path, stop_strings=["ab"], train_dataset=prompts(12), **settings)
        made.value_function.head.weight.data.copy_(torch.linspace(-1, 1, 32)[None])
        assert made.shares_first_pass
        made.shares_first_pass = shares
        begun = {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}
        calls: list[bool] = []
        made.policy.base_model.register_forward_hook(
            lambda *args, calls=calls: calls.append(torch.is_grad_enabled()),
        )
        complete = made.rollouts.complete
        made.rollouts.complete = lambda *args, real=complete, calls=calls: (real(*args), calls.clear())[0]  # type: ignore[method-assign]  # of one trainer
        made.train()
        passes.append(calls)
        found.append({name: p.detach() for name, p in made.model.named_parameters() if p.requires_grad})
        logs.append([entry for entry in made.state.log_history if "loss" in entry])
        assert any((p - begun[name]).abs().max() > 1e-3 for name, p in found[-1].items())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0.0, atol=1e-6, msg=name)
    for mine, other in zip(*logs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
    # Of the last rollout, without its generation: two updates, and what the old log-probabilities took; the reference
    # of the adapter is the same model
    assert passes[0] == ([False, True, True] if adapter else [True, True])
    assert passes[1] == ([False, False, True, True] if adapter else [False, True, True])


class Jitter(nn.Module):
    """As in some mixtures of experts: noise in training alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 0.01 * torch.rand_like(x)) if self.training else x


CASES: dict[str, tuple[bool, PeftConfig | None, dict[str, Any]]] = {
    "lora": (True, lora(lora_dropout=0.5), {}),
    "full": (True, None, {}),
    "dropout": (False, lora(lora_dropout=0.5), {"disable_dropout": False}),
    "noise": (False, lora(), {"neftune_noise_alpha": 5.0}),
    "mini-batches": (False, lora(), {"num_mini_batches": 2}),
    "accumulation": (False, lora(), {"gradient_accumulation_steps": 2}),
    "dora": (False, lora(use_dora=True), {}),
    "virtual tokens": (False, PromptTuningConfig(num_virtual_tokens=2, **TASK), {}),
    "dylora": (False, DyLoRAConfig(r=4, ranks=[2, 4], target_modules=["q_proj"], **TASK), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_done_only_where_training_and_evaluation_compute_the_same(tmp_path: Path, name: str) -> None:
    shares, adapter, settings = CASES[name]
    assert trainer(tmp_path, peft_config=adapter, **settings).shares_first_pass == shares


def test_what_is_random_in_training_is_noticed(tmp_path: Path) -> None:
    model = get_peft_model(tiny_policy(), lora())
    norm = model.get_base_model().model.norm
    model.get_base_model().model.norm = nn.Sequential(norm, Jitter())
    made = trainer(tmp_path, model=model)
    assert not made.shares_first_pass
    assert model.training  # as it was


def test_rows_of_like_lengths_are_passed_together_and_give_the_same_update(tmp_path: Path) -> None:
    """Four rows of 2, 8, 2 and 8 tokens, two at a time: 2 x 2 + 2 x 8 places in place of 4 x 8."""

    def function(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = trainer.generator.tokenize(prompts)
        return {"prompt_ids": ids, "completion_ids": [[1] * len(p) for p in ids], "logprobs": None}

    rows = Dataset.from_list([{"prompt": text} for text in ("a", "bbbb", "c", "dddd")])
    found, widths = [], []
    for size in (2, 4):
        settings = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "num_ppo_epochs": 2, "max_steps": 2}
        settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "stop_token": None}
        settings |= {"rollout_forward_batch_size": size, "train_dataset": rows, "rollout_func": function}
        made = trainer(tmp_path, peft_config=lora(), **settings)
        seen: list[int] = []
        made.policy.base_model.register_forward_pre_hook(
            lambda module, args, inputs, seen=seen: seen.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        made.train()
        widths.append(seen)
        found.append({name: p.detach() for name, p in made.model.named_parameters() if p.requires_grad})
    # the reference, the old log-probabilities, and two updates; in one micro-batch the first update is both
    assert widths == [[4, 16] * 4, [32] * 3]
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0.0, atol=1e-6, msg=name)
