"""Two gloo processes train as one process does with the same prompts."""

from pathlib import Path

import pytest
import torch

from tests.processes import together
from tests.trainers.ppo.distributed_script import made

TIMES = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def test_two_processes(tmp_path: Path) -> None:
    together(Path(__file__).with_name("distributed_script.py"), tmp_path)
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    assert found["processes"] == 2
    assert found["same"]  # resumed from the middle of a rollout
    assert found["drawn"][0] != found["drawn"][1]

    one = made(tmp_path / "one", per_device_train_batch_size=4)
    one.train()
    logs = [entry for entry in one.state.log_history if "loss" in entry]
    for mine, theirs in zip(logs, found["logs"], strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            if key == "longest_prompt":  # the mean of what the reward functions of all processes have logged
                assert (mine[key], theirs[key]) == (4.0, 3.0)
            else:
                assert theirs[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-6), key
    evaluated = one.evaluate()
    for key in set(evaluated) - TIMES - {"eval_longest_prompt"}:
        assert found["eval"][key] == pytest.approx(evaluated[key], abs=1e-6), key
    own = dict(one.model.named_parameters())
    moved = 0.0
    for name, tensor in found["weights"].items():
        torch.testing.assert_close(tensor, own[name].detach(), rtol=1e-4, atol=1e-6, msg=name)
        if "lora_B" in name:
            moved = max(moved, float(tensor.abs().max()))
    assert moved > 1e-4
