"""Each example runs as a user would run it, at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stock_cases import tiny_llama

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_examples_are_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "classify.py",
        "density_loss.py",
        "plain_loop.py",
        "sft_trainer.py",
    }


def test_plain_loop(tmp_path: Path) -> None:
    assert "is in" in run("plain_loop.py", "--output", tmp_path, "--steps", 500)
    rows = {row["rank"]: row["metrics"]["mse"] for row in json.loads((tmp_path / "curve.json").read_text())["rows"]}
    assert rows[4] < rows[2] < rows[1] < rows[None]
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_density_loss(tmp_path: Path) -> None:
    assert "fewer" in run("density_loss.py", "--toy", "--output", tmp_path, "--steps", 60)
    assert json.loads((tmp_path / "density.json").read_text())["mean"]["all"]["exact"] < 0.3


@pytest.mark.parametrize("method", ["moslora", "loretta-rep", "loretta-adp"])
def test_classify(tmp_path: Path, method: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "?", "good", "bad", "film", "book"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="?")
    fast.save_pretrained(tmp_path / "tiny")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertForSequenceClassification(BertConfig(vocab_size=6, **sizes)).save_pretrained(tmp_path / "tiny")
    data = [{"sentence": f"{word} {thing}", "label": word == "good"} for word in ("good", "bad") for thing in words]
    for name in ("train", "eval"):
        lines = [json.dumps(row | {"label": int(row["label"])}) + "\n" for row in data * 4]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    files = ("--train", tmp_path / "train.jsonl", "--eval", tmp_path / "eval.jsonl")
    out = ("--output", tmp_path / "out", "--method", method, "--steps", 60, "--batch-size", 8, "--lr", 0.02)
    printed = run("classify.py", "--model", tmp_path / "tiny", *files, *out)
    assert f"{method}: accuracy 1.000" in printed
    assert (tmp_path / "out/adapter/adapter_config.json").is_file()
    assert (tmp_path / "out/lora").exists() == (method in ("dylora", "moslora", "loretta-rep"))


def test_sft_trainer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["</s>", "?", "say", "one", "two", "three"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="?")
    fast.save_pretrained(tmp_path / "tiny")
    tiny_llama().save_pretrained(tmp_path / "tiny")
    rows = [{"prompt": "say ", "completion": word} for word in ("one", "two", "three", "one two") * 5]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    printed = run(
        "sft_trainer.py", "--model", tmp_path / "tiny", "--data", tmp_path / "data.jsonl", "--output", out, "--steps", 3
    )
    assert "base" in printed
    assert json.loads((out / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["peft_type"] == "DYLORA"
