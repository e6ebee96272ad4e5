"""Each example runs as a user would run it, at toy size."""

import gzip
import json
import os
import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import transformers

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
        "checking.py",  # what the others share
        "citation_fid.py",
        "citation_sft.py",
        "classify.py",
        "density_loss.py",
        "distill_adapter.py",
        "distill_classifier.py",
        "distill_lm.py",
        "exit_early.py",
        "learn_scales.py",
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


def test_distill_classifier(tmp_path: Path) -> None:
    printed = run("distill_classifier.py", "--toy", "--output", tmp_path)
    alone, taught, teacher = map(float, re.findall(r"accuracy ([\d.]+)", printed))
    assert taught > alone + 0.1
    assert teacher > 0.9


def test_distill_lm(tmp_path: Path) -> None:
    printed = run("distill_lm.py", "--toy", "--output", tmp_path)
    plain, distilled = (json.loads(each) for each in re.findall(r"^\w+: (\{.*\})$", printed, re.M))
    assert distilled["loss"] < plain["loss"]
    assert distilled["agreement"] > 0.4
    assert json.loads((tmp_path / "cache" / "meta.json").read_text())["kind"] == "states"
    assert json.loads((tmp_path / "student" / "config.json").read_text())["num_hidden_layers"] == 2


def test_distill_adapter(tmp_path: Path) -> None:
    printed = run("distill_adapter.py", "--toy", "--output", tmp_path)
    *_, taught, teacher = map(float, re.findall(r"accuracy ([\d.]+)", printed))
    assert min(taught, teacher) > 0.85
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORETTA_REP"


def test_learn_scales(tmp_path: Path) -> None:
    printed = run("learn_scales.py", "--toy", "--shape", "scalar", "--output", tmp_path)
    assert "2 sources, 22 scales" in printed  # of five modules in each of two layers, and the pooler
    before, after = map(float, re.findall(r"accuracy ([\d.]+) before, ([\d.]+) after", printed)[0])
    assert after > before + 0.05
    assert f"one LoRA of rank 8: accuracy {after:.3f}" in printed
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "SCALEARN"


@pytest.mark.parametrize("kind", ["sft", "fid"])
def test_citations(tmp_path: Path, kind: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, T5ForConditionalGeneration

    from tests.trainers.citation.common import tiny_t5, tokenizer

    tokenizer(end=kind == "fid").save_pretrained(tmp_path / "tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaConfig(vocab_size=330, pad_token_id=0, eos_token_id=1, initializer_range=0.3, **sizes)
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
    training = ("--output_dir", out, "--max_steps", 30, "--per_device_train_batch_size", 4, "--report_to", "none")
    training += ("--learning_rate", 1e-2, "--logging_steps", 5)
    own = {
        "sft": ("--model_name_or_path", tmp_path / "tiny", "--use_peft", "--lora_target_modules", "all-linear"),
        "fid": ("--model", tmp_path / "tiny", "--passages_per_pass", 2, "--num_beams", 2),
    }
    options = (*sizes, *training, *own[kind], "--use_cpu", "true", "--bf16", "false")
    printed = run(f"citation_{kind}.py", "--rows", tmp_path / "rows.jsonl", *options)
    assert "| dropped: cites an id that no passage has | 1 |" in printed
    assert "| kept: citation marks rewritten | 10 |" in printed
    assert "valid_citations" in printed
    losses = [float(each) for each in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert losses[-1] < 0.6 * losses[0]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    assert all(len(row["passages"]) == 3 and isinstance(row["output"], str) for row in answers)
    assert (out / "report.html").is_file()
    assert (out / ("adapter_config.json" if kind == "sft" else "config.json")).is_file()


@pytest.mark.parametrize("method", ["moslora", "lamda", "loretta-rep", "loretta-adp"])
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
    assert (tmp_path / "out/lora").exists() == (method in ("dylora", "moslora", "lamda", "loretta-rep"))


def tiny_language_model(folder: Path) -> Path:
    """A model of two layers and a tokenizer of six words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["</s>", "?", "say", "one", "two", "three"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="?")
    fast.save_pretrained(folder / "tiny")
    model = tiny_llama()
    model.lm_head.weight.data *= 20  # so that it can be sure of a word
    model.save_pretrained(folder / "tiny")
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
    files = ("--model", tmp_path / "tiny", "--data", tmp_path / "data.jsonl", "--output", out)
    printed = run("sft_trainer.py", *files, "--steps", 100)
    losses = {row: float(loss) for row, loss in re.findall(r"^│ (\w+) +│ +([\d.]+) │$", printed, re.M)}
    assert min(losses.values()) < losses["base"] - 0.1
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
    rows = [{"prompt": f"say {word}", "answer": "one"} for word in ("one", "two", "three")] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ("--model_name_or_path", tiny_language_model(tmp_path), "--dtype", "float32")
    adapter = ("--use_peft", "--lora_target_modules", "all-linear", "--engine", "transformers")
    sizes = (
        "--per_device_train_batch_size",
        12,
        "--max_completion_length",
        4,
        "--num_ppo_epochs",
        2,
        "--max_steps",
        40,
    )
    rest = ("--temperature", 1.0, "--output_dir", tmp_path / "out", "--use_cpu", "true", "--logging_steps", 1)
    quiet = ("--report_to", "none", "--learning_rate", 3e-3, "--num_ppo_epochs", 2)
    printed = run("ppo_rollout_func.py", "--data", tmp_path / "rows.jsonl", *model, *adapter, *sizes, *rest, *quiet)
    first, last = map(float, re.findall(r"generated by transformers: reward ([\d.]+) to ([\d.]+)", printed)[0])
    assert last > first + 0.3  # it has learned to say the word
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


# What is wrong with a file, and what is said of it; {} is its path
FILES: dict[str, tuple[str | None, str]] = {
    "none.jsonl": (None, "{}: there is no such file. Name a file of JSON lines with"),
    "folder.jsonl": ("", "{}: it is a folder. Name a file of JSON lines with"),
    "empty.jsonl": ("\n\n", "{}: it has no rows. Name a file of JSON lines with"),
    "broken.jsonl": ('{"text": \n', "{}, line 1: it is not JSON"),
    "other.jsonl": ('{"else": 1}\n', "{}, line 1: a row needs"),
    "list.jsonl": ("[1]\n", "and this one has a list. Mend or drop it."),
    "binary.jsonl.gz": ("no gzip", "{}: it cannot be read"),
}
# How each example is called with a file of rows, and with another
CALLS = {
    "citation_fid.py": "--model MODEL --output_dir out --rows",
    "citation_sft.py": "--model_name_or_path MODEL --output_dir out --rows",
    "classify.py": "--model MODEL --train good.jsonl --eval",
    "density_loss.py": "--model MODEL --data",
    "distill_adapter.py": "--adapter ADAPTER --output out --data",
    "distill_classifier.py": "--model MODEL --output out --data",
    "distill_lm.py": "--teacher MODEL --output out --data",
    "ppo_glue.py": "--model_name_or_path MODEL --output_dir out --train_file good.jsonl --eval_file",
    "ppo_rollout_func.py": "--model_name_or_path MODEL --output_dir out --data",
    "sft_trainer.py": "--model MODEL --data",
    "soft.py": "--model MODEL --output_dir out --data",
    "train_entailment.py": "--model MODEL --train",
}
GOOD = {
    **{
        "sentence": "good",
        "text": "good",
        "label": 1,
        "prompt": "a",
        "completion": "b",
        "answer": "b [1]",
        "question": "a?",
    },
    **{"source": "a", "target": "b", "premise": "a", "hypothesis": "b", "passages": [{"text": "b"}]},
}
WRONG = [
    ("citation_fid.py", "--num_beams 0", "--num_beams 0: it must be at least 1"),
    ("citation_fid.py", "--held 1.5", "--held 1.5: it must be a share above 0 and below 1"),
    ("citation_fid.py", "--max_steps many", "invalid int value: 'many'"),
    ("citation_sft.py", "--passages -1", "--passages -1: it must be at least 1"),
    ("citation_sft.py", "--out_of_range keep", "--out_of_range keep: it must be drop or repair"),
    ("citation_sft.py", "--format mine", "--format mine: it must be alce or citer"),
    ("citation_sft.py", "--learning_rates 1", "--learning_rates"),
    ("citation_sft.py", "--passages 2", "--rows good.jsonl: none of the 1 rows can be used"),
    ("citation_sft.py", "--passages 1", "--rows good.jsonl: it must be a file of two questions or more"),
    ("classify.py", "--steps -3", "--steps: -3: it must be a whole number of at least 1"),
    ("classify.py", "--lr 0", "--lr: 0: it must be a number above 0"),
    ("classify.py", "--method qlora", "invalid choice: 'qlora'"),
    ("density_loss.py", "--steps 1.5", "--steps: 1.5: it must be a whole number of at least 1"),
    ("density_loss.py", "--keep 30", "--keep 30.0: it is a share above 0 and below 1"),
    ("distill_adapter.py", "--steps 0", "--steps: 0: it must be a whole number of at least 1"),
    ("distill_adapter.py", "--adapter none", "--adapter none: it must be a folder with an adapter_config.json"),
    ("distill_classifier.py", "--kd_weight 2", "--kd_weight='2': must be from 0 to 1"),
    ("distill_classifier.py", "--temperature 0:0", "--temperature='0:0': must be greater than 0"),
    ("distill_classifier.py", "", "--data good.jsonl: it must be a file of two rows or more"),
    ("distill_lm.py", "--depth 1", "--depth: 1: it must be a whole number of at least 2"),
    ("distill_lm.py", "--kd_weight half", "--kd_weight='half'"),
    ("exit_early.py", "--model MODEL --tokens 0", "--tokens: 0: it must be a whole number of at least 1"),
    ("plain_loop.py", "--steps -500", "--steps: -500: it must be a whole number of at least 1"),
    ("ppo_glue.py", "--task sst3", "--task sst3: task='sst3' is not known; there are cola"),
    ("ppo_glue.py", "--sft_steps -1", "--sft_steps -1: it must be at least 0"),
    ("ppo_glue.py", "--num_ppo_epochs 0", "num_ppo_epochs"),
    ("ppo_rollout_func.py", "--engine sglang", "--engine sglang: it must be auto, vllm or transformers"),
    ("sft_trainer.py", "--steps 0", "--steps: 0: it must be a whole number of at least 1"),
    ("soft.py", "--exits 0", "exits"),
    ("soft.py", "--config none.yaml", "none.yaml"),
    ("train_entailment.py", "--rows 1 2", "--rows [1, 2]: it must be a number for each of the 1 files of --train"),
    ("train_entailment.py", "--rows 5", "--rows 5: it must be at most 1, the rows of good.jsonl"),
    ("train_entailment.py", "--epochs -1", "--epochs: -1: it must be a number above 0"),
]
ALONE = [
    ("density_loss.py", "", "--data: name JSON lines with `source` and `target`, or pass --toy"),
    ("distill_adapter.py", "--output out", "--adapter and --data: name both, or pass --toy"),
    ("distill_classifier.py", "--output out --model MODEL", "--data: it is missing"),
    ("distill_lm.py", "--output out --teacher MODEL", "--data: it is missing"),
    ("soft.py", "", "--model and --data: name both, or pass --toy"),
    (
        "ppo_glue.py",
        "--model_name_or_path MODEL --train_file good.jsonl",
        "--train_file and --eval_file: pass both, or neither",
    ),
    ("ppo_glue.py", "--train_file good.jsonl --eval_file good.jsonl", "--model_name_or_path: it is missing"),
    ("sft_trainer.py", "--model ./none --data good.jsonl", "--model ./none: there is no such folder"),
    ("sft_trainer.py", "--model MODEL --data good.jsonl", "--data good.jsonl: it must be a file of two rows or more"),
    ("classify.py", "--model empty --train good.jsonl --eval good.jsonl", "--model empty: it is a folder without a"),
    (
        "classify.py",
        "--model MODEL --train good.jsonl --eval label.jsonl",
        "--eval label.jsonl: the label 'good': it must be a whole number from 0, and one that is in --train too",
    ),
    (
        "ppo_glue.py",
        "--model_name_or_path MODEL --train_file good.jsonl --eval_file label.jsonl",
        "--eval_file label.jsonl: label='good': for the task 'sst2' it",
    ),
]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Any:
    """Calls an example in this process, which has to end with code 2 before a model is loaded; what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("COLUMNS", "400")
    for kind in (transformers.PreTrainedModel, transformers.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", lambda *given, **more: pytest.fail("it goes on to the model"))
    (tmp_path / "good.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "label.jsonl").write_text(json.dumps(GOOD | {"label": "good"}) + "\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "MODEL").mkdir()
    (tmp_path / "ADAPTER").mkdir()
    (tmp_path / "ADAPTER" / "adapter_config.json").write_text("{}")
    (tmp_path / "MODEL" / "config.json").write_text("{}")

    def call(name: str, words: str) -> str:
        monkeypatch.setattr("sys.argv", [name, *words.split()])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert stop.value.code == 2
        *usage, line = capsys.readouterr().err.strip().splitlines()
        assert not any("Traceback" in each for each in usage)
        return line

    return call


@pytest.mark.parametrize("file", FILES)
def test_a_wrong_file_is_refused_before_a_model_is_loaded(file: str, tmp_path: Path, refused: Any) -> None:
    content, said = FILES[file]
    if content:
        (tmp_path / file).write_text(content)
    elif content is not None:
        (tmp_path / file).mkdir()
    for name, words in CALLS.items():
        line = refused(name, f"{words} {file}")
        assert f"{words.split()[-1]} {file}" in line, name
        assert said.format(file) in line, name


@pytest.mark.parametrize(("name", "words", "said"), WRONG)
def test_a_wrong_value_is_refused_before_a_model_is_loaded(name: str, words: str, said: str, refused: Any) -> None:
    rows = f"{CALLS[name]} good.jsonl" if name in CALLS else ""
    assert said in refused(name, f"{rows} {words}")


@pytest.mark.parametrize(("name", "words", "said"), ALONE)
def test_a_wrong_call_is_refused_before_a_model_is_loaded(name: str, words: str, said: str, refused: Any) -> None:
    assert said in refused(name, words)
