"""Which run a folder holds: what goes on, what is refused, and what an interruption leaves. Tiny runs."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dynamic.cli import _identity
from peft_dynamic.cli._interrupt import Interrupted, Interruption
from tests.cli import common
from tests.cli.common import AGREED, CHECK, ROWS, environment, invoke, message, start, write

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures


@pytest.fixture(scope="module", autouse=True)
def no_second_process() -> Iterator[None]:
    """What stock PEFT says in a process of its own is asked for in tests/test_cli.py; here it would only cost time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CHECK, lambda *a, **k: AGREED)
        yield


@pytest.fixture(scope="module")
def begun(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """A finished run of 4 steps with a checkpoint at each second one, and the options that it had."""
    folder = tmp_path_factory.mktemp("begun")
    data = write(folder / "data.jsonl", [{**row, "id": 1} for row in ROWS * 3])
    options: list[object] = ["train", "--model", tiny, "--data", data, "--ranks", "1,2", "--batch-size", 4]
    options += ["--steps", 4, "--save-steps", 2]
    result = invoke(*options, "--output", folder / "out")
    assert result.exit_code == 0, result.output
    return folder / "out", options


@pytest.fixture
def copied(begun: tuple[Path, list[object]], tmp_path: Path) -> tuple[Path, list[object]]:
    """The same, to be changed."""
    shutil.copytree(begun[0], tmp_path / "out")
    return tmp_path / "out", [*begun[1], "--output", tmp_path / "out"]


def test_the_run_says_what_it_is(begun: tuple[Path, list[object]]) -> None:
    content = json.loads((begun[0] / "run.yaml").read_text())
    assert content["run"]["training"]["steps"] == 4
    assert content["run"]["training"]["seed"] == content["run"]["data"]["split_seed"] == 0
    assert content["run"]["adapter"]["target_modules"] == "all-linear"
    assert content["run"]["data"]["rows"] == 17
    assert content["versions"]["torch"] == torch.__version__
    assert len(content["run"]["data"]["sha256"]) == 64
    report = (begun[0] / "report.md").read_text(encoding="utf-8")
    assert "Columns that are not read: id." in report
    assert "--data: 1 of 17 rows: fewer steps than one pass has." in report
    assert "4 steps of 4" in report
    card = (begun[0] / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "import peft_dynamic  # registers DYLORA with PEFT" in card
    assert "More Information Needed" not in card


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", 1], "training.seed was 0 and is 1"),
        (["--learning-rate", 0.1], "training.learning_rate was 0.0005 and is 0.1"),
        (["--steps", 5], "training.steps was 4 and is 5"),
        (["--ranks", "1,4"], "adapter.ranks was [1, 2] and is [1, 4]"),
        (["--max-length", 100], "training.max_length was 512 and is 100"),
        (["--instruction", "Say it."], "data.sha256 was"),
        (["--eval-data", "OTHER"], "data.held_out_source was None and is"),
        (["--data", "OTHER"], "data.sha256 was"),
    ],
)
def test_another_run_is_not_gone_on_with(
    begun: tuple[Path, list[object]], tmp_path: Path, options: list, words: str
) -> None:
    other = write(tmp_path / "other.jsonl", ROWS)
    given = [other if option == "OTHER" else option for option in options]
    before = {path: path.stat().st_mtime_ns for path in begun[0].rglob("*")}
    result = invoke(*begun[1], "--output", begun[0], *given, "--resume")
    assert result.exit_code == 2
    assert "holds another run" in message(result)
    assert words in message(result)
    assert {path: path.stat().st_mtime_ns for path in begun[0].rglob("*")} == before


def test_a_run_goes_on_from_the_last_whole_checkpoint(copied: tuple[Path, list[object]]) -> None:
    out, options = copied
    last = out / "checkpoints" / "checkpoint-4"
    content = (last / "optimizer.pt").read_bytes()
    (last / "optimizer.pt").write_bytes(content[: len(content) // 2])
    whole = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "adapter")
    result = invoke(*options, "--resume")
    assert result.exit_code == 0, result.output
    assert "checkpoint-4 is not whole (BadZipFile: File is not a zip file)" in message(result)
    assert "Going on from checkpoint-2." in message(result)
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    assert _identity.fault(last) is None  # written anew


@pytest.mark.parametrize(
    "name",
    [
        *("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt"),
        *("rng_state.pth", "trainer_state.json"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "garbage"])
def test_a_checkpoint_that_is_not_whole_is_seen(copied: tuple[Path, list[object]], name: str, damage: str) -> None:
    folder = copied[0] / "checkpoints" / "checkpoint-2"
    assert _identity.fault(folder) is None
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes({"empty": b"", "half": content[: len(content) // 2], "garbage": b"\0x"}[damage])
    assert _identity.fault(folder)


def test_with_no_whole_checkpoint_it_says_so(copied: tuple[Path, list[object]]) -> None:
    out, options = copied
    for path in (out / "checkpoints").iterdir():
        (path / "trainer_state.json").write_text('{"global_step": 3}')
    result = invoke(*options, "--resume")
    assert result.exit_code == 1
    assert "trainer_state.json is of step 3" in message(result)
    assert "Start with --overwrite" in message(result)
    for content in ("", "{}", "[]", '{"run": 3, "versions": {}, "dtype": "x"}'):
        (out / "run.yaml").write_text(content)
        result = invoke(*options, "--resume")
        assert result.exit_code == 2
        assert "run.yaml cannot be read, so which run it was is not known" in message(result)
    (out / "run.yaml").unlink()
    assert "run.yaml is missing" in message(invoke(*options, "--resume"))


def test_overwriting_removes_the_old_run_and_nothing_else(copied: tuple[Path, list[object]]) -> None:
    out, options = copied
    (out / "mine.txt").write_text("mine")
    (out / "checkpoints" / "notes").mkdir()
    assert "pass one of them" in message(invoke(*options, "--resume", "--overwrite"))
    shutil.rmtree(out / "adapter")
    result = invoke(*options)
    assert result.exit_code == 2
    assert "holds the checkpoints of a run. Pass --resume to go on with it, --overwrite to remove it" in message(result)
    position = options.index("--save-steps")
    shorter = [*options[: position - 2], "--steps", 2, "--save-steps", 2, *options[position + 2 :]]
    # a model that does not load costs nothing of the old run
    broken = ["--model", out / "nothing"]
    assert invoke(*shorter, *broken, "--overwrite").exit_code == 2
    assert (out / "checkpoints" / "checkpoint-4").exists()
    result = invoke(*shorter, "--overwrite", "--seed", 5)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-2", "notes"]
    assert (out / "mine.txt").read_text() == "mine"
    assert json.loads((out / "run.yaml").read_text())["run"]["training"]["seed"] == 5
    # and a resume now goes on with the new one
    assert invoke(*shorter, "--resume", "--seed", 0).exit_code == 2


def test_files_of_others_are_not_replaced_unasked(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", ROWS)
    (tmp_path / "report.md").write_text("mine")
    options = ["train", "--model", tiny, "--data", data, "--ranks", "1", "--steps", 1, "--output", tmp_path]
    result = invoke(*options)
    assert result.exit_code == 2
    assert f"{tmp_path} holds report.md, which would be replaced" in message(result)
    assert (tmp_path / "report.md").read_text() == "mine"
    (tmp_path / "run.yaml").write_text("{}")  # left by a run that was stopped before its first checkpoint
    assert invoke(*options).exit_code == 0


def test_the_identity_is_of_the_data_and_its_order(tmp_path: Path) -> None:
    from peft_dynamic.cli._data import Columns, to_examples

    def digest(rows: list[dict]) -> str:
        return _identity.digest(to_examples(rows, Columns(), "x", "--data"))

    assert digest(ROWS) == digest([dict(row) for row in ROWS])
    assert len({digest(rows) for rows in (ROWS, ROWS[::-1], ROWS[1:], [{**ROWS[0], "prompt": "x"}, *ROWS[1:]])}) == 4
    assert digest(ROWS) != digest([{**row, "tools": [{"name": "f"}]} for row in ROWS])


def test_differences_are_named() -> None:
    then, now = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert _identity.differences(then, now) == ["a.c was 2 and is 4", "d was 3 and is None", "e was None and is 5"]
    assert _identity.differences(then, then) == []


def test_a_budget_bounds_a_run(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", ROWS * 3)
    options = ["--model", tiny, "--data", data, "--ranks", "1,2", "--batch-size", 4, "--steps", 100_000]
    result = invoke("train", *options, "--output", tmp_path / "out", "--max-minutes", 0.1)
    assert result.exit_code == 0, result.output
    assert "--max-minutes leaves time for" in message(result)
    report = (tmp_path / "out" / "report.md").read_text()
    assert " of 100000 steps of 4" in report
    assert (tmp_path / "out" / "curve.json").is_file()
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_without_matplotlib_there_is_no_picture_and_all_else(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = write(tmp_path / "data.jsonl", ROWS)
    result = invoke(
        "train", "--model", tiny, "--data", data, "--ranks", "1", "--steps", 1, "--output", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    assert "There is no picture: it needs matplotlib. Install it with: pip install matplotlib" in message(result)
    assert {"curve.json", "report.md", "adapter", "run.yaml"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "curve.png" not in (tmp_path / "out" / "report.md").read_text()


def test_signals_stop_at_once_or_after_the_step() -> None:
    interruption = Interruption()
    before = signal.getsignal(signal.SIGTERM)
    with interruption.watched():
        steps = []
        with pytest.raises(Interrupted), interruption.gently():
            steps += [signal.raise_signal(signal.SIGTERM), "the step ends"]
        assert len(steps) == 2
        assert interruption.number == signal.SIGTERM
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    again = Interruption()
    with again.watched(), pytest.raises(Interrupted), again.gently():
        steps += [signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)]
    assert len(steps) == 2  # the second one stops at once
    assert signal.getsignal(signal.SIGTERM) == before


def stopped(process: Any, lines: Iterable[str], until: str, stop: signal.Signals) -> None:
    """Send the signal when a line begins so."""
    assert any(line.startswith(until) for line in lines)
    os.kill(process.pid, stop)


def assert_left(folder: Path, status: int, errors: str, stop: signal.Signals) -> str:
    """What an interruption leaves in the end, and the command that goes on."""
    assert status == 128 + stop, errors
    assert "Traceback" not in errors
    assert "out has all up to step" in errors
    again = errors.partition("Go on with: ")[2].strip()
    assert again.endswith(" --resume")
    assert (folder / "out" / "run.yaml").is_file()
    return again


def test_an_interrupted_training_leaves_what_there_is_and_says_how_to_go_on(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", ROWS * 3)
    options = ["--model", tiny, "--data", data, "--ranks", "1,2", "--batch-size", 1, "--output", tmp_path / "out"]
    begun = start("train", *options, "--steps", 5000, cwd=tmp_path)
    stopped(begun.process, begun.lines(timeout=200), "step ", signal.SIGINT)
    done = begun.ended(timeout=100)
    assert_left(tmp_path, done.returncode, done.stderr, signal.SIGINT)


@pytest.fixture(scope="module")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A run that was stopped while it measured its ranks, in an interpreter of its own: folder, status and errors."""
    folder = tmp_path_factory.mktemp("measured")
    data = write(folder / "data.jsonl", ROWS * 100)
    options = ["--model", tiny, "--data", data, "--ranks", "1,2", "--batch-size", 1, "--output", folder / "out"]
    words = [sys.executable, "-m", "peft_dynamic.cli", "train", *map(str, options), "--steps", "2"]
    settings = {"env": environment(PYTHONUNBUFFERED="1"), "cwd": folder, "text": True, "encoding": "utf-8"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)
    assert process.stdout is not None
    stopped(process, process.stdout, "rank 1: measured", signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    return folder, process.returncode, errors


def test_an_interrupted_measurement_leaves_what_there_is_and_goes_on_as_it_says(
    measured: tuple[Path, int, str],
) -> None:
    folder, status, errors = measured
    again = assert_left(folder, status, errors, signal.SIGTERM)
    rows = json.loads((folder / "out" / "curve.json").read_text())["rows"]
    assert rows[0]["rank"] == 1
    assert (folder / "out" / "adapter" / "adapter_config.json").is_file()
    words = shlex.split(again)
    assert words[:4] == [sys.executable, "-m", "peft_dynamic.cli", "train"]
    done = invoke(*words[3:])
    assert done.exit_code == 0, done.output
    assert (folder / "out" / "report.md").is_file()


def test_an_encoder_is_refused_before_training(tiny: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaModel

    data = write(tmp_path / "data.jsonl", ROWS)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=32)
    llama = LlamaConfig(**sizes, intermediate_size=32, tie_word_embeddings=False)
    for made, words in [
        (BertModel(config), "has no weights for"),
        (BertForMaskedLM(config), "sees what comes after a token: it is an encoder"),
        (LlamaModel(llama), "has no weights for 1 tensors of LlamaForCausalLM, such as lm_head.weight"),
    ]:
        folder = tmp_path / type(made).__name__
        shutil.copytree(tiny, folder)
        made.save_pretrained(folder)
        result = invoke("train", "--model", folder, "--data", data, "--output", tmp_path / "out")
        assert result.exit_code == 1, result.output
        assert words in message(result)
        assert not (tmp_path / "out").exists()
    for damage in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = tmp_path / f"damaged {damage}"
        shutil.copytree(tiny, folder)
        (folder / damage).write_bytes((folder / damage).read_bytes()[:50])
        result = invoke("train", "--model", folder, "--data", data, "--output", tmp_path / "out")
        assert result.exit_code == 1, result.output
        assert f"--model: '{folder}'" in message(result)
        assert "not foreseen" not in message(result)
        assert not (tmp_path / "out").exists()


def test_decoders_of_all_kinds_are_causal() -> None:
    from peft_dynamic.cli._load import is_causal
    from tests.stock_cases import build, tiny_llama

    assert is_causal(build("llama")[0])
    assert is_causal(tiny_llama().train())


def test_where_an_output_cannot_be_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    data = write(tmp_path / "data.jsonl", ROWS)
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = invoke("train", "--model", "m/m", "--data", data, "--output", out)
        assert result.exit_code == 2
        assert "file is a file; pass a folder" in message(result)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    result = invoke("train", "--model", "m/m", "--data", data, "--output", tmp_path / "locked")
    assert f"nothing can be written in {tmp_path}" in message(result)


def test_an_interruption_before_the_training_says_that_nothing_is_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_dynamic.cli._run.load_decoder", lambda *a: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["bin/peft-dynamic", "train", "--model", "a b", "--overwrite"])
    data = write(tmp_path / "data.jsonl", ROWS)
    result = invoke("train", "--model", tiny, "--data", data, "--output", tmp_path / "out")
    assert result.exit_code == 128 + signal.SIGTERM
    assert "Nothing was written. Start again with: bin/peft-dynamic train --model 'a b'" in message(result)
    assert not (tmp_path / "out").exists()


def test_the_output_may_be_the_current_folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "data.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    result = invoke("train", "--model", tiny, "--data", data, "--ranks", "1", "--steps", 1, "--output", ".")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.md").is_file()
    assert data.is_file()
