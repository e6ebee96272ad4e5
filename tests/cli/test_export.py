"""`peft-dynamic export`: every method that a LoRA can express, and no traceback for any damaged adapter."""

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_dynamic import LorettaAdpConfig
from tests import methods
from tests.cli import common
from tests.cli.common import command, forked, invoke, message

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures

METHODS = methods.configs("all-linear", lora=True)
INPUTS = torch.tensor([[3, 4, 5, 6]])


def saved(tiny: Path, folder: Path, config: Any) -> nn.Module:
    """An adapter with random values, saved; the model that it belongs to."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_a_lora_can_express(tiny: Path, tmp_path: Path, method: str, task_type: str | None) -> None:
    model = saved(tiny, tmp_path / "adapter", METHODS[method](task_type=task_type))
    rank = ["--rank", 2] if hasattr(model, "set_rank") else []
    result = invoke("export", tmp_path / "adapter", tmp_path / "lora", *rank)
    assert result.exit_code == 0, result.output
    assert "as a stock LoRA adapter." in message(result)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    if rank:
        model.set_rank(2)
    with torch.no_grad():
        expected = model(INPUTS).logits
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "lora").eval()
        torch.testing.assert_close(stock(INPUTS).logits, expected)


def test_what_cannot_be_exported_says_why(tiny: Path, tmp_path: Path) -> None:
    configs = {
        "adp": LorettaAdpConfig(bottleneck=8, tensor_rank=2, task_type="CAUSAL_LM"),
        "stock": LoraConfig(r=2, task_type="CAUSAL_LM"),
        "dylora": METHODS["dylora"](task_type="CAUSAL_LM"),
        "moslora": METHODS["moslora"](task_type="CAUSAL_LM"),
    }
    for name, config in configs.items():
        saved(tiny, tmp_path / name, config)
    (tmp_path / "file").write_text("")
    cases = [
        (["adp", "out"], "LORETTA_ADP adapter: small networks between the layers, which no LoRA can express"),
        (["stock", "out"], "is a stock LoRA adapter already"),
        (["dylora", "out"], "--rank: missing. Pass the rank to write, up to 4"),
        (["moslora", "out", "--rank", 2], "a MOSLORA adapter has one rank. Leave the option out"),
        (["moslora", "file"], "is a file; pass a folder"),
        (["moslora", "file/x"], "there can be no folder in it"),
        (["moslora", "moslora"], "holds a MOSLORA adapter"),
    ]
    for arguments, words in cases:
        places = [tmp_path / word if isinstance(word, str) and i < 2 else word for i, word in enumerate(arguments)]
        result = invoke("export", *places)
        assert result.exit_code == 2, result.output
        assert words in message(result)
        assert not (tmp_path / "out").exists()
    result = invoke("export", tmp_path / "moslora", tmp_path / "out", "--model", tmp_path / "no-model")
    assert result.exit_code == 1
    assert "no-model' could not be loaded" in message(result)
    assert "Pass --model with the one that was trained on." in message(result)


def test_the_class_is_taken_from_the_base_model_with_a_warning(tiny: Path, tmp_path: Path) -> None:
    saved(tiny, tmp_path / "adapter", METHODS["moslora"]())
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"auto_mapping": None}
    path.write_text(json.dumps(config))
    done = forked("export", tmp_path / "adapter", tmp_path / "lora")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("Warning: the adapter says neither its task_type nor its model's class; it is taken")
    assert done.stderr.count("\n") == 1
    mapping = {"base_model_class": "Own", "parent_library": "my.models"}
    path.write_text(json.dumps(config | {"auto_mapping": mapping}))
    result = invoke("export", tmp_path / "adapter", tmp_path / "other", "--model", tiny)
    assert result.exit_code == 1
    assert "is of a Own of my.models, and the command loads models of transformers alone" in message(result)
    mapping = {"base_model_class": "NoSuchModel", "parent_library": "transformers.models.llama"}
    path.write_text(json.dumps(config | {"auto_mapping": mapping}))
    assert "has no transformers.models.llama.NoSuchModel" in message(
        invoke("export", tmp_path / "adapter", tmp_path / "o", "--model", tiny)
    )


def test_an_export_says_one_line(tiny: Path, tmp_path: Path) -> None:
    saved(tiny, tmp_path / "adapter", METHODS["dylora"](task_type="CAUSAL_LM"))
    done = command("export", "adapter", "lora", "--rank", 2, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Rank 2 of adapter is in lora, as a stock LoRA adapter.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_export_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    saved(tiny, tmp_path / "adapter", METHODS["dylora"](task_type="CAUSAL_LM"))
    monkeypatch.setattr("peft_dynamic.algebra.checkpoint.save_file", lambda *a, **k: signal.raise_signal(number))
    result = invoke("export", tmp_path / "adapter", tmp_path / "lora", "--rank", 2)
    assert result.exit_code == 128 + number
    assert "Stopped. Nothing is left half done." in message(result)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


ODD = [None, "", "x", -1, 0, 3, 1.5, 10**30, True, [], {}, [1], {"a": 1}, "\ud800", ["x"], {"q_proj": "x"}]


def mutated(content: dict, seed: int) -> dict:
    """The same with one value replaced, dropped, or renamed."""
    chance = random.Random(seed)
    key = chance.choice(sorted(content))
    kind = chance.randrange(4)
    if kind == 0:
        return {name: value for name, value in content.items() if name != key}
    if kind == 1:
        return {f"{name}x" if name == key else name: value for name, value in content.items()}
    return content | {key: chance.choice(ODD)}


def damaged(path: Path, seed: int) -> None:
    """Bytes of a file changed, dropped or added."""
    chance = random.Random(seed)
    content = bytearray(path.read_bytes())
    kind = chance.randrange(4)
    if kind == 0:
        del content[chance.randrange(len(content)) :]
    elif kind == 1:
        for _ in range(8):
            content[chance.randrange(min(len(content), 400))] = chance.randrange(256)
    elif kind == 2:
        start = chance.randrange(len(content))
        content[start : start + chance.randrange(1, 50)] = bytes(chance.randrange(256) for _ in range(20))
    else:
        content += bytes(chance.randrange(256) for _ in range(20))
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore")  # what hosts say of such files
@pytest.mark.parametrize("method", ["dylora", "loretta-rep"])
def test_no_damage_gives_a_traceback(tiny: Path, tmp_path: Path, method: str) -> None:
    saved(tiny, tmp_path / "adapter", METHODS[method](task_type=None))
    rank = ["--rank", 2] if method == "dylora" else []
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    stopped = 0
    for seed in range(60):
        folder = tmp_path / str(seed)
        shutil.copytree(tmp_path / "adapter", folder)
        if seed % 3 == 0:
            damaged(folder / "adapter_model.safetensors", seed)
        elif seed % 3 == 1:
            damaged(folder / "adapter_config.json", seed)
        else:
            (folder / "adapter_config.json").write_text(json.dumps(mutated(config, seed)))
        result = invoke("export", folder, tmp_path / f"{seed}-lora", *rank)
        assert result.exit_code in (0, 1, 2)
        assert result.exception is None or isinstance(result.exception, SystemExit), seed
        assert "not foreseen" not in result.output, f"{seed}: {result.output}"
        if result.exit_code:
            stopped += 1
            assert not (tmp_path / f"{seed}-lora").exists()
    assert stopped > 20
