"""The files of examples/accelerate, with the command, at toy size: each trains what one process trains."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("deepspeed")
pytest.importorskip("trl")

from tests.cli import common
from tests.cli.common import HERE, forked, write
from tests.processes import free_port

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures

RECIPES = HERE / "examples" / "accelerate"
SCRIPT = Path(__file__).with_name("recipe_script.py")
ROWS = [{"prompt": f"Say {n} of eight.", "completion": f" {n} it is!"} for n in range(8)]
VERBS = ["sft", "soft"]
RUNS = [("ddp", "sft"), ("fsdp2", "soft"), ("zero2", "soft"), ("zero3", "sft")]  # the others are in the tables


def settings(verb: str, model: Path, folder: Path, processes: int) -> dict[str, Any]:
    """A run of four rows a step."""
    found: dict[str, Any] = {
        "model_name_or_path": str(model),
        "dataset_name": str(write(folder.parent / "rows.jsonl", ROWS)),
        "output_dir": str(folder / verb),
        "max_steps": 3,
        "per_device_train_batch_size": 4 // processes,
        "per_device_eval_batch_size": 4 // processes,
        "eval_data": str(write(folder.parent / "rows.jsonl", ROWS)),
        "eval_strategy": "steps",
        "eval_steps": 3,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "max_length": 64,
        "bf16": False,
        "dtype": "float32",
        "logging_steps": 1,
    }
    if verb == "sft":
        found |= {"adapter": "dylora", "r": 4, "ranks": [1, 2, 4], "target_modules": "all-linear", "curve_ranks": "1,4"}
    else:
        found |= {
            "use_peft": True,
            "lora_r": 4,
            "lora_target_modules": ["all-linear"],
            "lora_dropout": 0.0,
            "exits": [1, 2],
        }
    return found


def words(verb: str, file: Path, made: dict[str, Any]) -> list[str]:
    file.write_text(yaml.safe_dump(made))
    return [verb, "--config", str(file)]


def losses(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    return [{k: v for k, v in entry.items() if k == "loss" or k.endswith("_loss")} for entry in state["log_history"]]


@pytest.fixture(scope="module")
def single(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "out"
    for verb in VERBS:
        file = folder.parent / f"{verb}.yaml"
        done = forked(*words(verb, file, settings(verb, tiny, folder, 1) | {"use_cpu": True}), cwd=folder.parent)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize(("recipe", "verb"), RUNS)
def test_a_recipe_trains_what_one_process_trains(
    tmp_path: Path, tiny: Path, single: Path, recipe: str, verb: str
) -> None:
    folder = tmp_path / "out"
    own = {"use_cpu": True} if recipe == "ddp" else {}
    command = words(verb, tmp_path / f"{verb}.yaml", settings(verb, tiny, folder, 2) | own)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", RECIPES / f"{recipe}.yaml"]
    # what a GPU would have, and this machine has not
    launcher += ["--mixed_precision", "no", "--main_process_port", str(free_port())]
    launcher += ["--cpu"] if recipe == "ddp" else []
    environment = common.environment(OMP_NUM_THREADS="1", ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")
    done = subprocess.run(
        [*launcher, SCRIPT, *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("Saved in") == 1  # one of the two processes speaks
    found, wanted = (load_file(each / verb / "adapter_model.safetensors") for each in (folder, single))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert any(value.abs().max() > 0 for name, value in found.items() if "lora_B" in name)
    assert [entry.keys() for entry in losses(folder / verb)] == [entry.keys() for entry in losses(single / verb)]
    for mine, theirs in zip(losses(folder / verb), losses(single / verb), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_every_recipe_is_run() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {recipe for recipe, _ in RUNS}


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_the_commands_of_a_recipe_are_there(recipe: str) -> None:
    text = (RECIPES / f"{recipe}.yaml").read_text()
    commands = re.findall(r"^#   accelerate launch --config_file (\S+) -m peft_dynamic.cli (\w+)", text, re.MULTILINE)
    assert {path for path, _ in commands} == {f"examples/accelerate/{recipe}.yaml"}
    assert {verb for _, verb in commands} == {*VERBS, "ppo"}
