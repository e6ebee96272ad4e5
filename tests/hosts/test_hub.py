"""Facts about saving and pushing that we rely on: a release that breaks one turns a test red by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_dynamic.cards.write import own_text
from tests import hub_server
from tests.hub_server import Hub
from tests.stock_cases import build

hub = hub_server.hub  # fixture
pytestmark = [
    pytest.mark.filterwarnings(hub_server.HOSTS_WARNING),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


class Watched(LoraConfig):
    """Notes what is in the folder when the configuration is saved."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        self.seen = sorted(path.name for path in Path(save_directory).iterdir())
        super().save_pretrained(save_directory, **kwargs)
        (Path(save_directory) / "rank-1").mkdir(exist_ok=True)
        (Path(save_directory) / "rank-1" / "adapter_config.json").write_text("{}")


def watched() -> Any:
    return get_peft_model(build("llama")[0], Watched(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_peft_saves_the_configuration_last(tmp_path: Path) -> None:
    model = watched()
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].seen == ["README.md", "adapter_model.safetensors"]


def test_the_form_that_peft_writes_is_known_as_one(tmp_path: Path) -> None:
    watched().save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "More Information Needed" in text
    assert own_text(text) == ""
    assert own_text(text.replace("Model Card for Model ID", "Poems")) != ""


def test_push_to_hub_sends_the_folders_in_what_it_saved_and_a_readme_of_its_own(hub: Hub) -> None:
    watched().push_to_hub("me/poet")
    assert hub.files("me/poet")["rank-1/adapter_config.json"] == b"{}"
    assert "pushed on the Hub" in hub.files("me/poet")["README.md"].decode()


class Puts(TrainerCallback):
    """Notes when a push begins, and puts a folder and a README where Trainer pushes from."""

    def __init__(self) -> None:
        self.begun: list[bool] = []

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert hasattr(model, "peft_config")
        output = Path(args.output_dir)
        self.begun.append((output / f"checkpoint-{state.global_step}" / "adapter_config.json").is_file())
        (output / "rank-9").mkdir(exist_ok=True)
        (output / "rank-9" / "adapter_config.json").write_text("{}")
        (output / "README.md").write_text("---\nlicense: mit\n---\n\nOurs.\n")


def test_trainer_asks_before_each_push_and_sends_its_output_folder_whole(hub: Hub, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 1, "save_steps": 1, "push_to_hub": True, "hub_model_id": "me/poet"}
    settings |= {"hub_strategy": "every_save", "use_cpu": True, "report_to": [], "disable_tqdm": True}
    puts = Puts()
    ids = torch.arange(6)
    model = get_peft_model(build("llama")[0], LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    arguments = TrainingArguments(str(tmp_path), **settings)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}], callbacks=[puts])
    trainer.train()
    trainer.push_in_progress.wait_until_done()
    assert puts.begun == [True]  # the checkpoint is there, and was not pushed yet
    saved = hub.files("me/poet")
    assert saved["rank-9/adapter_config.json"] == b"{}"
    assert saved["README.md"].decode().endswith("Ours.\n")
    assert json.loads(saved["adapter_config.json"])["r"] == 2
    assert not any(name.startswith("checkpoint") for name in saved)
    trainer.push_to_hub()
    assert len(puts.begun) == 2
    assert "rank-9/adapter_config.json" in hub.files("me/poet")
    assert "Ours." not in hub.files("me/poet")["README.md"].decode()  # Trainer writes its own afterwards


def test_create_commit_makes_one_commit_of_many_files(hub: Hub) -> None:
    api = HfApi(token=hub_server.TOKEN, endpoint=hub.url)
    api.create_repo("me/many")
    files = [CommitOperationAdd(path_in_repo=f"{i}.txt", path_or_fileobj=b"%d" % i) for i in range(300)]
    api.create_commit("me/many", files, commit_message="All")
    assert hub.history("me/many") == ["initial commit", "All"]
    assert len(hub.files("me/many")) == 301
