"""`target_kl`: the rest of a rollout is skipped, and nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.trainers.ppo.common import config, trainer


def made(folder: Path, **settings: Any) -> Any:
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    defaults = {"lr_scheduler_type": "constant", "weight_decay": 0.1, "learning_rate": 1e-3, "peft_config": adapter}
    return trainer(folder, **(defaults | settings))


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_rollout_that_has_moved_too_far_is_left(tmp_path: Path, accumulation: int) -> None:
    sizes = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    # Each rollout's first step is at the policy that sampled, with a change of 0; any change at its second is too much
    early = made(tmp_path / "early", num_ppo_epochs=4, max_steps=8, target_kl=1e-12, **sizes)
    early.train()
    short = made(tmp_path / "short", num_ppo_epochs=2, max_steps=4, **sizes)
    short.train()
    assert early.state.global_step == 8
    wanted = weights(short)
    for name, tensor in weights(early).items():
        assert torch.equal(tensor, wanted[name]), name
    logs = [entry for entry in early.state.log_history if "loss" in entry]
    assert ["approx_kl" in entry for entry in logs] == [True, True, False, False] * 2
    assert [entry.get("skipped_steps") for entry in logs] == [None, None, 1.0, 1.0] * 2
    assert [entry["grad_norm"] > 0 for entry in logs] == [True, True, False, False] * 2
    seldom = made(tmp_path / "seldom", num_ppo_epochs=4, max_steps=8, target_kl=1e-12, logging_steps=8, **sizes)
    seldom.train()
    total = next(entry for entry in seldom.state.log_history if "loss" in entry)
    assert total["skipped_steps"] == 0.5
    of_steps = [entry["approx_kl"] for entry in logs if "approx_kl" in entry]
    assert total["approx_kl"] == pytest.approx(sum(of_steps) / 4, rel=1e-5)  # of the steps that were computed
    assert max(of_steps) > 1e-12


def test_a_large_target_changes_nothing(tmp_path: Path) -> None:
    found = []
    for target in (None, 1e6):
        each = made(tmp_path / str(target), num_ppo_epochs=3, max_steps=6, target_kl=target)
        each.train()
        found.append(weights(each))
        assert not any("skipped_steps" in entry for entry in each.state.log_history)
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_that_is_resumed_where_steps_are_skipped_goes_on_skipping(tmp_path: Path, step: int) -> None:
    settings = {"num_ppo_epochs": 4, "max_steps": 8, "target_kl": 1e-12, "save_strategy": "steps", "save_steps": 1}
    whole = made(tmp_path, **settings)
    whole.train()
    resumed = made(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    wanted = weights(whole)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(resumed).items())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"target_kl": 0.0}, r"target_kl=0.0 must be above 0, or None"),
        ({"target_kl": "0.1"}, r"target_kl must be a finite number or None, got '0.1'"),
        ({"target_kl": 0.1, "fp16": True, "use_cpu": False}, r"target_kl=0.1 leaves .* fp16 .*bf16=True"),
    ],
)
def test_values_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        config(tmp_path, **settings)
