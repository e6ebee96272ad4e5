"""Pushes of transformers' Trainer to a Hub on loopback: twins and card, and checkpoints no larger than before."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_dynamic import DyLoRAConfig
from peft_dynamic.trainers import HubCallback
from tests import hub_server
from tests.hub_server import Hub
from tests.stock_cases import build, compute

hub = hub_server.hub  # fixture
pytestmark = [
    pytest.mark.filterwarnings(hub_server.HOSTS_WARNING),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
DYLORA = DyLoRAConfig(r=4, ranks=[1, 2, 4], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class Patient(TrainerCallback):
    """Waits for each push: a thread makes it, and a slow one would give way to the next, or be of its files."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.push_in_progress is not None:
            self.trainer.push_in_progress.wait_until_done()


def trained(output: Path, callback: HubCallback | None, config: Any = DYLORA, **settings: Any) -> Trainer:
    arguments: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "push_to_hub": True, "hub_model_id": "me/poet"}
    arguments |= {"per_device_train_batch_size": 2, "learning_rate": 0.1, "use_cpu": True, "report_to": []}
    arguments |= {"disable_tqdm": True, "hub_always_push": True, **settings}
    trainer = Trainer(
        get_peft_model(build("llama")[0], config),
        TrainingArguments(str(output), **arguments),
        train_dataset=[{"input_ids": torch.arange(i, i + 6), "labels": torch.arange(i, i + 6)} for i in range(4)],
        callbacks=[callback] if callback else [],
    )
    trainer.add_callback(Patient(trainer))
    trainer.train()
    return trainer


def folders(files: dict[str, bytes]) -> list[str]:
    return sorted({name.partition("/")[0] for name in files if "/" in name})


def from_files(files: dict[str, bytes], folder: str, into: Path) -> PeftModel:
    into.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (into / name).write_bytes(files[f"{folder}/{name}"])
    return PeftModel.from_pretrained(build("llama")[0], into).eval()


def test_every_save_has_the_twins_of_its_own_adapter_and_our_card(hub: Hub, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "out", HubCallback(ranks=[2], license="mit"), hub_strategy="every_save")
    history = hub.repos["me/poet"]["main"]
    assert [message for _, message, _ in history] == [
        *("initial commit", "Training in progress, step 1", "Training in progress, step 2"),
    ]
    for step, (_, _, files) in enumerate(history[1:], start=1):
        assert folders(files) == ["rank-2"]
        card = files["README.md"].decode()
        assert "import peft_dynamic  # registers DYLORA" in card
        assert 'from_pretrained(base, "me/poet", subfolder="rank-2")' in card
        assert "license: mit" in card
        saved = PeftModel.from_pretrained(build("llama")[0], tmp_path / f"out/checkpoint-{step}").eval()
        saved.set_rank(2)
        found = from_files(files, "rank-2", tmp_path / f"twin-{step}")
        inputs = build("llama")[1]
        torch.testing.assert_close(compute(found, inputs), compute(saved, inputs), rtol=0, atol=0)
        assert not (tmp_path / f"out/checkpoint-{step}/rank-2").exists()
    assert trainer.model.get_rank() == 4  # as it was


def test_the_last_push_has_the_twins_and_the_trainers_own_card(hub: Hub, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "out", HubCallback(), config=LORA, hub_strategy="end", save_steps=5)
    assert not (tmp_path / "out" / "rank-2").exists()
    trainer.push_to_hub()
    files = hub.files("me/poet")
    assert folders(files) == ["rank-1", "rank-2"]
    assert 'subfolder="rank-2"' in files["rank-2/README.md"].decode()
    assert "## Training and evaluation data" in files["README.md"].decode()
    whole, small = (load(files[f"{place}adapter_model.safetensors"]) for place in ("", "rank-2/"))
    for name, value in small.items():
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            update, cut = whole[other] @ whole[name], small[other] @ value
            best = torch.linalg.svdvals(update)[2:].square().sum().sqrt()
            torch.testing.assert_close((update - cut).norm(), best, rtol=1e-3, atol=1e-6)


def test_hub_ranks_come_along_without_a_callback(hub: Hub, tmp_path: Path) -> None:
    config = DyLoRAConfig(**{**DYLORA.to_dict(), "peft_type": None, "hub_ranks": [2]})
    trainer = trained(tmp_path / "out", None, config=config, hub_strategy="end", save_steps=5)
    trainer.push_to_hub()
    assert folders(hub.files("me/poet")) == ["rank-2"]


def test_what_cannot_be_made_ends_no_training(hub: Hub, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"this push has no plain-LoRA twins: ranks=9: must be a whole number"):
        trained(tmp_path / "out", HubCallback(ranks=[9]), hub_strategy="every_save", max_steps=1)
    assert folders(hub.files("me/poet")) == []
    assert json.loads(hub.files("me/poet")["adapter_config.json"])["peft_type"] == "DYLORA"


def test_twins_that_are_no_more_go(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "rank-8").mkdir()
    (tmp_path / "rank-8" / "adapter_config.json").write_text("{}")
    (tmp_path / "rank-notes").mkdir()
    with warnings.catch_warnings():
        trained(tmp_path, HubCallback(ranks=[2]), hub_strategy="every_save", max_steps=1)
    assert sorted(path.name for path in tmp_path.glob("rank-*")) == ["rank-2", "rank-notes"]
