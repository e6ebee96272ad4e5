"""The training verbs with TRL's ways of handing over rows, and over a quantised base model.

The rows have 2 w + 7 letters each, w those of the word, with the token that ends them: 86 in the six of them, 26 in the
first two.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("trl")

from tests.cli import common
from tests.cli.common import FORKED, ROWS, invoke, message, write
from tests.cli.test_training_verbs import DYLORA, RUN, run, same, words
from tests.processes import Started

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures


def state_of(folder: Path) -> tuple[float, int]:
    """Epochs and tokens at the last step."""
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    tokens = [row["num_tokens"] for row in state["log_history"] if "num_tokens" in row]
    return state["epoch"], int(tokens[-1])


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rows")
    return {"model_name_or_path": tiny, "dataset_name": write(folder / "rows.jsonl", ROWS), **RUN, **DYLORA}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any]) -> Path:
    """A run without any of it."""
    folder = tmp_path_factory.mktemp("plain")
    run("sft", folder, output_dir=folder / "out", **given)
    return folder / "out"


def test_packing_fills_the_length(tmp_path: Path, given: dict[str, Any]) -> None:
    run("sft", tmp_path, output_dir=tmp_path / "out", packing=True, **given)
    assert state_of(tmp_path / "out") == (4, 4 * 86)  # two rows of up to 64, so each step of two sees all of them


def test_a_stream_is_read_as_far_as_the_steps_go(tmp_path: Path, given: dict[str, Any]) -> None:
    run("sft", tmp_path, output_dir=tmp_path / "out", dataset_streaming=True, **given)
    assert state_of(tmp_path / "out") == (1.25, 86 + 26)  # in the order of the file


def test_a_mixture_of_a_yaml_file(tmp_path: Path, given: dict[str, Any]) -> None:
    parts = [given["dataset_name"], write(tmp_path / "more.jsonl", ROWS[:2])]
    mixture = [{"path": "json", "data_files": str(part), "split": "train"} for part in parts]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    del settings["dataset_name"]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings | {"datasets": mixture}))
    run("sft", tmp_path, config=file, output_dir=tmp_path / "out")
    assert state_of(tmp_path / "out") == (1, 86 + 26)
    # and what it wrote down gives the same again
    run("sft", tmp_path, config=tmp_path / "out" / "run.yaml", output_dir=tmp_path / "again")
    same(tmp_path / "out", tmp_path / "again")

    both = invoke("sft", "--config", file, "--dataset_name", parts[0])
    assert both.exit_code == 2
    assert f"--dataset_name {parts[0]} and a mixture under datasets: one of them is wanted" in message(both)
    settings = {name: value for name, value in settings.items() if name != "max_steps"}
    file.write_text(yaml.safe_dump(settings | {"datasets": mixture, "streaming": True}))
    assert "--streaming true: a stream's length is not known" in message(invoke("sft", "--config", file))


TURN = "{% generation %}{{ each['content'] + eos_token }}{% endgeneration %}"
ASKED = "{% if each['role'] == 'user' %}{{ each['content'] }}{% else %}TURN{% endif %}"
TEMPLATE = f"{{% for each in messages %}}{ASKED}{{% endfor %}}"


def test_the_loss_of_the_assistant_alone_is_that_of_completions(
    tmp_path: Path, given: dict[str, Any], plain: Path
) -> None:
    def turns(row: dict[str, str]) -> list[dict[str, str]]:
        texts = {"user": row["prompt"], "assistant": row["completion"]}
        return [{"role": role, "content": text} for role, text in texts.items()]

    base = shutil.copytree(given["model_name_or_path"], tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE.replace("TURN", TURN))
    chats = write(tmp_path / "chats.jsonl", [{"messages": turns(row)} for row in ROWS])
    settings = given | {"model_name_or_path": base, "dataset_name": chats, "assistant_only_loss": True}
    run("sft", tmp_path, output_dir=tmp_path / "out", **settings)
    same(tmp_path / "out", plain)

    (base / "chat_template.jinja").write_text(TEMPLATE.replace("TURN", "{{ each['content'] }}"))
    refused = invoke("sft", *words(output_dir=tmp_path / "refused", **settings))
    assert refused.exit_code == 2, refused.output
    said = f"--assistant_only_loss: true: the chat template of {base} has no {{% generation %}} around the assistant's"
    assert said in message(refused)
    assert not (tmp_path / "refused").exists()


COUNTED = """
from peft_dynamic.cli import _fit
callbacks = _fit._callbacks
def counted(given, trainer, interruption):
    kinds = [type(module).__name__ for module in trainer.model.modules()]
    print("Linear4bit:", kinds.count("Linear4bit"))
    callbacks(given, trainer, interruption)
_fit._callbacks = counted
"""


@pytest.mark.parametrize("adapter", ["dylora", "qdylora"])
def test_a_base_model_in_4_bits(tmp_path: Path, given: dict[str, Any], adapter: str) -> None:
    pytest.importorskip("bitsandbytes")
    settings = given | {"load_in_4bit": True, "adapter": adapter, "output_dir": tmp_path / "out", "max_steps": 2}
    code = FORKED.format(before=COUNTED)
    done = Started("-c", (code, "sft", *words(**settings)), tmp_path, common.environment()).ended(timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == adapter.upper()
    assert "Linear4bit: 0" not in done.stdout
    assert "Linear4bit: " in done.stdout


def test_a_stock_lora_over_4_bits_trains_on_after_an_evaluation(tmp_path: Path, given: dict[str, Any]) -> None:
    """CPUs with AVX512-BF16 have a kernel without gradients, which an evaluation would switch on."""
    pytest.importorskip("bitsandbytes")
    settings = {name: value for name, value in given.items() if name not in DYLORA} | {"adapter": "lora"}
    settings |= {"load_in_4bit": True, "eval_data": given["dataset_name"], "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"max_steps": 3, "logging_steps": 1, "save_steps": 3, "load_best_model_at_end": False}
    run("sft", tmp_path, output_dir=tmp_path / "out", **settings)
    log = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in log if "eval_loss" in row] == [1, 2, 3]
    norms = [row["grad_norm"] for row in log if "grad_norm" in row]
    assert len(norms) == 3
    assert min(norms) > 0


def test_ppo_refuses_a_stream(given: dict[str, Any]) -> None:
    base = words(model_name_or_path=given["model_name_or_path"], dataset_name=given["dataset_name"])
    result = invoke("ppo", *base, "--dataset_streaming", "true", "--max_steps", "2")
    assert result.exit_code == 2, result.output
    assert "--dataset_streaming true: ppo reads its rows by number, which a stream does not have" in message(result)
