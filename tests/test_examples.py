"""Each example runs as a user would run it, at toy size."""

import gzip
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.processes import python
from tests.stock_cases import tiny_llama

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: object) -> str:
    # whatever the terminal, the locale and the folder of whoever runs the tests
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "PYTHONUTF8": "1", "COLUMNS": "400"}
    for variable in ("FORCE_COLOR", "NO_COLOR", "TERM", "LINES", "PYTHONIOENCODING"):
        environment.pop(variable, None)
    with tempfile.TemporaryDirectory() as folder:
        printed = python(EXAMPLES / name, *arguments, env=environment, cwd=Path(folder))
        left = [path.name for path in Path(folder).iterdir()]
    assert not left  # all is written where it was asked for
    return printed


def as_people_write(rows: list[Any]) -> str:
    """JSON lines with a mark of their encoding in front, and an empty line behind each."""
    return "\ufeff" + "".join(json.dumps(row) + "\n\n" for row in rows)


def test_all_examples_are_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "citation_fid.py",
        "citation_sft.py",
        "classify.py",
        "density_loss.py",
        "exit_early.py",
        "plain_loop.py",
        "ppo_glue.py",
        "ppo_rollout_func.py",
        "sft_trainer.py",
        "train_entailment.py",
        "soft.py",
    }


def test_plain_loop(tmp_path: Path) -> None:
    assert "is in" in run("plain_loop.py", "--output", tmp_path, "--steps", 500)
    rows = {row["rank"]: row["metrics"]["mse"] for row in json.loads((tmp_path / "curve.json").read_text())["rows"]}
    assert rows[4] < rows[2] < rows[1] < rows[None]
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_density_loss(tmp_path: Path) -> None:
    printed = run("density_loss.py", "--toy", "--output", tmp_path, "--steps", 60)
    assert "fewer" in printed
    losses = [float(each) for each in re.findall(r"step \d+: loss ([\d.]+)", printed)]
    assert losses[1] < 0.9 * losses[0]  # before the density loss comes in
    assert json.loads((tmp_path / "density.json").read_text())["mean"]["all"]["exact"] < 0.3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "--data: name JSON lines"), (("--data", "none.jsonl"), "--data none.jsonl: there is no such file")],
)
def test_density_loss_says_what_is_missing(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(AssertionError, match=said) as error:
        run("density_loss.py", *arguments)
    assert "Traceback (most recent call last)" not in str(error.value)


@pytest.mark.parametrize("kind", ["sft", "fid"])
def test_citations(tmp_path: Path, kind: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, T5ForConditionalGeneration

    from tests.trainers.citation.common import tiny_t5, tokenizer

    tokenizer(end=kind == "fid").save_pretrained(tmp_path / "tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaConfig(vocab_size=330, pad_token_id=0, eos_token_id=1, **sizes)
    model = LlamaForCausalLM(llama) if kind == "sft" else T5ForConditionalGeneration(tiny_t5())
    model.save_pretrained(tmp_path / "tiny")
    facts = [{"title": f"Fact {i}", "text": f"The sea is {i} wide."} for i in range(12)]
    rows = [
        {"question": f"How wide is {i}?", "passages": facts[i : i + 2], "answer": f"It is {i} [1, 2]."}
        for i in range(10)
    ]
    rows += [{**rows[0], "answer": "[7]"}]
    (tmp_path / "rows.jsonl").write_text(as_people_write(rows), encoding="utf-8")
    out = tmp_path / "out"
    sizes = ("--passages", 3, "--held", 0.2, "--max_length", 700 if kind == "sft" else 64, "--max_new_tokens", 8)
    training = ("--output_dir", out, "--max_steps", 2, "--per_device_train_batch_size", 2, "--report_to", "none")
    own = {
        "sft": ("--model_name_or_path", tmp_path / "tiny", "--use_peft", "--lora_target_modules", "all-linear"),
        "fid": ("--model", tmp_path / "tiny", "--passages_per_pass", 2, "--num_beams", 2),
    }
    options = (*sizes, *training, *own[kind], "--use_cpu", "true", "--bf16", "false")
    printed = run(f"citation_{kind}.py", "--rows", tmp_path / "rows.jsonl", *options)
    assert "| dropped: cites an id that no passage has | 1 |" in printed
    assert "| kept: citation marks rewritten | 10 |" in printed
    assert "valid_citations" in printed
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    assert all(len(row["passages"]) == 3 and isinstance(row["output"], str) for row in answers)
    assert (out / "report.html").is_file()
    assert (out / ("adapter_config.json" if kind == "sft" else "config.json")).is_file()


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
        rows = [row | {"label": int(row["label"])} for row in data * 4]
        (tmp_path / f"{name}.jsonl").write_text(as_people_write(rows), encoding="utf-8")
    files = ("--train", tmp_path / "train.jsonl", "--eval", tmp_path / "eval.jsonl")
    out = ("--output", tmp_path / "out", "--method", method, "--steps", 60, "--batch-size", 8, "--lr", 0.02)
    printed = run("classify.py", "--model", tmp_path / "tiny", *files, *out)
    assert f"{method}: accuracy 1.000" in printed
    assert (tmp_path / "out/adapter/adapter_config.json").is_file()
    assert (tmp_path / "out/lora").exists() == (method in ("dylora", "moslora", "loretta-rep"))


def tiny_language_model(folder: Path) -> Path:
    """A model of two layers and a tokenizer of six words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["</s>", "?", "say", "one", "two", "three"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="?")
    fast.save_pretrained(folder / "tiny")
    tiny_llama().save_pretrained(folder / "tiny")
    return folder / "tiny"


def test_exit_early(tmp_path: Path) -> None:
    out = ("--output", tmp_path / "out", "--tokens", 5)
    printed = run("exit_early.py", "--model", tiny_language_model(tmp_path), "--text", "say one two", *out)
    chosen = next(line for line in printed.splitlines() if line.startswith("exit "))
    layers = json.loads((tmp_path / "out" / "small" / "config.json").read_text())["num_hidden_layers"]
    assert chosen.startswith(f"exit {layers}: say one two")
    assert "thresholds {" in printed
    assert "drafts accepted: say one two" in printed


def test_sft_trainer(tmp_path: Path) -> None:
    tiny_language_model(tmp_path)
    rows = [{"prompt": "say ", "completion": word} for word in ("one", "two", "three", "one two") * 5]
    (tmp_path / "data.jsonl").write_text(as_people_write(rows), encoding="utf-8")
    out = tmp_path / "out"
    printed = run(
        "sft_trainer.py", "--model", tmp_path / "tiny", "--data", tmp_path / "data.jsonl", "--output", out, "--steps", 3
    )
    assert "base" in printed
    assert json.loads((out / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["peft_type"] == "DYLORA"


def test_train_entailment(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "?", "[SEP]", "good", "bad", "film", "book"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[SEP] $A", pair="[SEP]:0 $A:0 [SEP]:1 $B:1", special_tokens=[("[SEP]", 2)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="?")
    fast.save_pretrained(tmp_path / "tiny")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=7, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "tiny")
    things = [
        ("good film", "good", True),
        ("bad film", "good", False),
        ("good book", "good", True),
        ("bad", "good", False),
    ]
    claims = [
        {"claim": b, "references": [a, "film"], "label": "attributable" if label else "not attributable"}
        for a, b, label in things * 4
    ]
    pairs = [{"premise": a, "hypothesis": b, "label": 0 if label else 2} for a, b, label in things * 4]
    (tmp_path / "claims.jsonl.gz").write_bytes(gzip.compress(as_people_write(claims).encode()))
    (tmp_path / "pairs.jsonl").write_text(as_people_write(pairs), encoding="utf-8")
    out = tmp_path / "out"
    files = (
        "--train",
        tmp_path / "claims.jsonl.gz",
        tmp_path / "pairs.jsonl",
        "--eval",
        f"toy={tmp_path / 'pairs.jsonl'}",
    )
    settings = (
        "--epochs",
        12,
        "--batch-size",
        8,
        "--lr",
        0.005,
        "--irrelevant",
        0,
        "--save-steps",
        20,
        "--rows",
        16,
        15,
    )
    printed = run("train_entailment.py", "--model", tmp_path / "tiny", *files, "--output", out, *settings)
    assert "toy" in printed
    assert json.loads((out / "scores.json").read_text())["toy"] == {"auc": 1.0, "balanced_accuracy": 1.0, "rows": 16}
    assert json.loads((out / "model" / "config.json").read_text())["id2label"] == {
        "0": "not_supported",
        "1": "supported",
    }
    # Run again, it goes on from the last checkpoint, of which nothing is left to do.
    assert "toy" in run("train_entailment.py", "--model", tmp_path / "tiny", *files, "--output", out, *settings)


def test_ppo_glue(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.trainers.ppo.nlu_words import tokenizer

    tokenizer().save_pretrained(tmp_path / "tiny")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    }
    config = LlamaConfig(vocab_size=6, eos_token_id=0, pad_token_id=0, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    # Of these words "No" has a token of its own, and the label goes by it
    rows = [{"sentence": text, "label": label} for text, label in (("No", 0), ("a", 1), ("No a", 0), ("a a", 1)) * 4]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(as_people_write(rows), encoding="utf-8")
    out = tmp_path / "out"
    settings = {
        "task": "cola",
        "train_file": str(tmp_path / "train.jsonl"),
        "eval_file": str(tmp_path / "eval.jsonl"),
        "model_name_or_path": str(tmp_path / "tiny"),
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "dtype": "float32",
        "sft_steps": 60,
        "sft_learning_rate": 0.01,
        "per_device_train_batch_size": 16,
        "max_steps": 4,
        "num_ppo_epochs": 2,
        "learning_rate": 0.001,
        "max_completion_length": 4,
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    # JSON is YAML, too
    (tmp_path / "settings.yaml").write_text(json.dumps(settings))
    printed = run("ppo_glue.py", "--config", tmp_path / "settings.yaml")
    assert "ppo: matthews_correlation" in printed
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores) == ["before", "sft", "ppo"]
    assert scores["before"]["unparsable"] > 0.5
    assert scores["sft"]["unparsable"] == scores["ppo"]["unparsable"] == 0.0
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_ppo_rollout_func(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {word}", "answer": word} for word in ("one", "two", "three")] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ("--model_name_or_path", tiny_language_model(tmp_path), "--dtype", "float32")
    adapter = ("--use_peft", "--lora_target_modules", "all-linear", "--engine", "transformers")
    sizes = ("--per_device_train_batch_size", 4, "--max_completion_length", 4, "--num_ppo_epochs", 2, "--max_steps", 4)
    rest = ("--temperature", 0.7, "--output_dir", tmp_path / "out", "--use_cpu", "true", "--logging_steps", 1)
    quiet = ("--report_to", "none", "--learning_rate", 1e-3)
    printed = run("ppo_rollout_func.py", "--data", tmp_path / "rows.jsonl", *model, *adapter, *sizes, *rest, *quiet)
    assert "generated by transformers: reward" in printed
    difference = printed.partition("of the policy differ by ")[2].split()[0]
    assert float(difference) < 1e-4  # the stand-in's are the policy's, computed otherwise
    assert (tmp_path / "out/adapter_config.json").is_file()


def test_soft(tmp_path: Path) -> None:
    config = tmp_path / "soft.yaml"
    config.write_text(f"output_dir: {tmp_path / 'out'}\nuse_cpu: true\nmax_steps: 150\n")
    printed = run("soft.py", "--toy", "--config", config)
    lines = [line.split() for line in printed.splitlines() if line.startswith("after ")]
    losses = {int(line[1]): float(line[4]) for line in lines}
    assert [*losses] == [1, 2, 4]
    assert max(losses.values()) < 1.0  # it has learned to count: a guess among 30 numbers is 3.4
    kept = int(printed.rpartition("the model of ")[2].split()[0])
    assert json.loads((tmp_path / f"out/{kept}-layers/config.json").read_text())["num_hidden_layers"] == kept
    assert json.loads((tmp_path / "out/model/config.json").read_text())["num_hidden_layers"] == 4
