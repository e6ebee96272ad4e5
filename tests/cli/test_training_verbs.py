"""The training verbs: TRL's settings, TRL's trainers, any adapter, and what a TRL script would give."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file

pytest.importorskip("trl")

from tests.cli import common
from tests.cli.common import ROWS, forked, invoke, message, start, write
from tests.processes import free_port, python
from tests.tuners.test_distributed import ACCELERATE_CONFIG

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures

RUN = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 2, "max_length": 64}
DYLORA = {"adapter": "dylora", "r": 4, "ranks": [1, 2, 4], "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def words(**settings: object) -> list[str]:
    """As a user writes them on the command line."""
    found = []
    for name, value in settings.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        found += [f"--{name}", text.lower() if isinstance(value, bool) else text]
    return found


def run(verb: str, folder: Path, **settings: object) -> Any:
    done = forked(verb, *words(**settings), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(ours: Path, theirs: Path) -> None:
    found, wanted = weights(ours), weights(theirs)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in found.items())


TEN_LINES = """
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer
from peft_dynamic.trainers import AdapterParser

script, training, model, adapter = AdapterParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config()
rows = load_dataset("json", data_files=script.dataset_name, split="train")
trainer = SFTTrainer(model.model_name_or_path, args=training, train_dataset=rows, peft_config=adapter)
trainer.train()
trainer.save_model()
"""


@pytest.mark.parametrize("adapter", [DYLORA, {"use_peft": True, "lora_r": 2, "lora_target_modules": ["all-linear"]}])
def test_a_yaml_file_gives_the_weights_of_a_trl_script_bit_for_bit(
    tmp_path: Path, tiny: Path, adapter: dict[str, Any]
) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    settings = {"model_name_or_path": str(tiny), "dataset_name": str(rows), "bf16": False, **RUN, **adapter}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    run("sft", tmp_path, config=file, output_dir=tmp_path / "ours")
    python("-c", TEN_LINES, "--config", str(file), "--output_dir", str(tmp_path / "theirs"), env=common.environment())
    same(tmp_path / "ours", tmp_path / "theirs")
    # and what it wrote down gives them again
    again = run("sft", tmp_path, config=tmp_path / "ours" / "run.yaml", output_dir=tmp_path / "again")
    assert "Saved in" in again.stdout
    same(tmp_path / "ours", tmp_path / "again")


def test_ranks_are_measured_while_it_trains_and_a_run_that_was_stopped_goes_on(tmp_path: Path, tiny: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    settings = {"model_name_or_path": tiny, "dataset_name": rows, "eval_data": rows, **RUN, **DYLORA}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "curve_ranks": "1,4", "max_steps": 6}
    settings |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_rank_1_loss",
        "report_to": "tensorboard",
    }
    whole = tmp_path / "whole"
    run("sft", tmp_path, output_dir=whole, **settings)
    state = json.loads((whole / "checkpoint-6" / "trainer_state.json").read_text())
    logged = [row["eval_rank_1_loss"] for row in state["log_history"] if "eval_rank_1_loss" in row]
    assert len(logged) == 3
    assert state["best_metric"] == min(logged)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(whole.glob("runs/*"))))
    events.Reload()
    assert [round(each.value, 4) for each in events.Scalars("eval/rank_1_loss")] == [round(v, 4) for v in logged]

    settings |= {"max_steps": 40, "save_steps": 1000, "eval_strategy": "no", "load_best_model_at_end": False}
    del settings["curve_ranks"]
    stopped = start("sft", *words(output_dir=tmp_path / "half", **settings), cwd=tmp_path)
    next(line for line in stopped.lines(timeout=200) if "'loss'" in line)
    os.kill(stopped.process.pid or 0, signal.SIGINT)
    done = stopped.ended(timeout=100)
    assert done.returncode == 130, done.stdout + done.stderr
    found = re.search(r"has all up to step (\d+). Go on with: (.*)", done.stderr)
    assert found, done.stderr
    assert (tmp_path / "half" / f"checkpoint-{found[1]}").is_dir()
    assert found[2].endswith("--resume_from_checkpoint true")
    run("sft", tmp_path, output_dir=tmp_path / "half", resume_from_checkpoint="true", **settings)
    run("sft", tmp_path, output_dir=tmp_path / "once", **settings)
    same(tmp_path / "half", tmp_path / "once")


def test_two_processes_write_one_set_of_files(tmp_path: Path, tiny: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    settings = {"model_name_or_path": tiny, "dataset_name": rows, "output_dir": tmp_path / "two", "use_cpu": True}
    settings |= {**RUN, **DYLORA, "eval_data": rows, "eval_strategy": "steps", "eval_steps": 4}
    settings |= {"curve_ranks": "2", "save_steps": 2}
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    started = [start("sft", *words(**settings), cwd=tmp_path, **shared, **rank) for rank in ranks]
    done = [each.ended(timeout=250) for each in started]
    assert [each.returncode for each in done] == [0, 0], "\n".join(each.stdout + each.stderr for each in done)
    assert [each.stdout.count("Saved in") for each in done] == [1, 0]
    assert done[1].stdout == ""  # one of them speaks
    state = json.loads((tmp_path / "two" / "checkpoint-4" / "trainer_state.json").read_text())
    measured = [row["eval_rank_2_loss"] for row in state["log_history"] if "eval_rank_2_loss" in row]
    assert measured

    # the same rows at the same rank in this process alone: what they measured together is their mean
    model = loaded(tiny, tmp_path / "two")
    from peft_dynamic.callbacks import mean_loss

    with torch.no_grad(), model.at_rank(2):
        alone = mean_loss(model, encoded(tiny, ROWS, 4))["loss"]
    assert measured[-1] == pytest.approx(alone, rel=1e-5)


def test_accelerate_launch_gives_the_weights_of_one_process(tmp_path: Path, tiny: Path) -> None:
    # of one length, so that the mean over the tokens of two processes is the mean over those of the whole batch
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"Say {c}.", "completion": f"{c}!"} for c in "abcdefgh"])
    settings = {"model_name_or_path": tiny, "dataset_name": rows, "use_cpu": True, **RUN, **DYLORA}
    settings |= {"optim": "sgd", "learning_rate": 1}  # Adam would divide small gradients' rounding by themselves
    sizes = {"one": 4, "two": 2}
    given = {
        name: words(**settings | {"output_dir": tmp_path / name, "per_device_train_batch_size": size})
        for name, size in sizes.items()
    }
    (tmp_path / "launch.yaml").write_text(ACCELERATE_CONFIG.format(port=free_port()))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "launch.yaml"]
    one = start("sft", *given["one"], cwd=tmp_path)
    two = subprocess.run(
        [*launcher, "-m", "peft_dynamic.cli", "sft", *given["two"]],
        cwd=tmp_path,
        env=common.environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert two.returncode == 0, two.stdout + two.stderr
    alone = one.ended(timeout=100)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert two.stdout.count("Saved in") == 1
    assert files_in(tmp_path / "two") == files_in(tmp_path / "one")
    found, wanted = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert found.keys() == wanted.keys()
    assert any("lora_B" in name and tensor.abs().max() > 1e-2 for name, tensor in wanted.items())
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-6), name


def files_in(folder: Path) -> list[str]:
    """All but each process's random state."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if not path.name.startswith("rng_state"))


def of_trackio(folder: Path) -> dict[str, list[float]]:
    """What a run logged, by the names of the values."""
    found: dict[str, list[float]] = {}
    with closing(sqlite3.connect(folder / "huggingface.db")) as database:
        for (row,) in database.execute("select metrics from metrics order by id"):
            for name, value in json.loads(row).items():
                found.setdefault(name, []).append(value)
    return found


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not here; the extra test has it")
def test_trackio_gets_what_is_measured(tmp_path: Path, tiny: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    settings = {"model_name_or_path": tiny, "dataset_name": rows, "eval_data": rows, **RUN, **DYLORA}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "curve_ranks": "1", "report_to": "trackio"}
    done = forked("sft", *words(output_dir=tmp_path / "out", **settings), cwd=tmp_path, TRACKIO_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    found = of_trackio(tmp_path)
    for name, logged in [("eval_rank_1_loss", "eval/rank_1_loss"), ("eval_loss", "eval/loss"), ("loss", "train/loss")]:
        assert found[logged] == [pytest.approx(row[name]) for row in state["log_history"] if name in row]
        assert len(found[logged]) == 2


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not here, 20 MB that no extra has: pip install wandb")
def test_wandb_gets_what_is_measured_offline(tmp_path: Path, tiny: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    settings = {"model_name_or_path": tiny, "dataset_name": rows, "eval_data": rows, **RUN, **DYLORA}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "curve_ranks": "1", "report_to": "wandb"}
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    # wandb writes its file when the interpreter ends, which a forked one does without it
    done = common.command("sft", *words(output_dir=tmp_path / "out", **settings), cwd=tmp_path, **offline)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"eval/rank_1_loss" in written.read_bytes()


def loaded(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def encoded(base: Path, rows: list[dict[str, str]], size: int) -> list[dict[str, torch.Tensor]]:
    """The rows as SFTTrainer makes them: prompt and completion, the completion and the end learnt."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"] + tokenizer.eos_token)["input_ids"]
        found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    return [collate(found[i : i + size]) for i in range(0, len(found), size)]


def test_a_token_is_in_no_file(tmp_path: Path, tiny: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    settings = {"model_name_or_path": tiny, "dataset_name": rows, **RUN, **DYLORA, "max_steps": 1}
    done = run("sft", tmp_path, output_dir=tmp_path / "out", hub_token="hf_nobody_may_see_this", **settings)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"run.yaml", "training_args.bin"} <= {path.name for path in files}
    assert [path for path in files if b"nobody_may_see" in path.read_bytes()] == []
    assert "nobody_may_see" not in done.stdout + done.stderr


def test_labels_are_names_numbers_or_values() -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    from peft_dynamic.cli._classes import Labels

    named = Labels.of(Dataset.from_list(CLASSES), "label")
    assert [named.number(label) for label in ("no", "yes", 1)] == [0, 1, 1]
    numbers = Labels.of(Dataset.from_list([{"label": 0}, {"label": 2}]), "label")
    assert numbers.names == ("0", "1", "2")
    assert Labels.of(Dataset.from_list([{"label": 0.5}, {"label": 2.0}]), "label").number(2) == 2.0
    features = Features({"text": Value("string"), "label": ClassLabel(names=["b", "a"])})
    assert Labels.of(Dataset.from_dict({"text": ["x"], "label": [1]}, features), "label").names == ("b", "a")
    with pytest.raises(typer.BadParameter, match="'maybe' is no label of the training rows, which have no, yes"):
        named.number("maybe")
    with pytest.raises(typer.BadParameter, match="labels are names, whole numbers from 0"):
        Labels.of(Dataset.from_list([{"label": 1}, {"label": None}]), "label")


def test_soft_trains_depths_under_an_adapter(tmp_path: Path, tiny: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    settings = {"model_name_or_path": tiny, "dataset_name": rows, "output_dir": tmp_path / "out", **RUN, **DYLORA}
    done = run("soft", tmp_path, exits="1,2", **settings)
    assert re.search(r"'exit_1_loss': '[\d.]+'", done.stdout)
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["exits"] == "1,2"
    assert "def register" not in (tmp_path / "out" / "README.md").read_text()
    assert "import peft_dynamic" in (tmp_path / "out" / "README.md").read_text()


CLASSES = [{"text": word * 3, "label": ["no", "yes"][i % 2]} for i, word in enumerate(("ab", "cd", "ef", "gh") * 4)]


@pytest.mark.parametrize(("rows", "metric"), [(CLASSES, "accuracy"), ("numbers", "mse")])
def test_classify_trains_a_head_and_measures_it_at_a_rank(tmp_path: Path, tiny: Path, rows: Any, metric: str) -> None:
    if rows == "numbers":
        rows = [{"a": row["text"], "b": "x", "label": 0.5 * i} for i, row in enumerate(CLASSES)]
    file = write(tmp_path / "rows.jsonl", rows)
    settings = {"model_name_or_path": tiny, "dataset_name": file, "eval_data": file, "output_dir": tmp_path / "out"}
    training = {name: value for name, value in RUN.items() if name != "max_length"}
    settings |= {**training, **DYLORA, "eval_strategy": "steps", "eval_steps": 2, "curve_ranks": "1", "max_steps": 4}
    run("classify", tmp_path, **settings)
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    last = [row for row in state["log_history"] if f"eval_rank_1_{metric}" in row][-1]
    assert last[f"eval_rank_1_{metric}"] >= 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert any("score" in name for name in weights(tmp_path / "out"))


def test_ppo_finds_a_function_of_the_working_directory(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def short(prompts, completions, **kwargs):\n    return [-float(len(c)) for c in completions]\n"
    )
    rows = write(tmp_path / "rows.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    settings = {"model_name_or_path": tiny, "dataset_name": rows, "reward_funcs": "my_rewards.short", **DYLORA}
    settings |= {"max_steps": 2, "max_completion_length": 4, "per_device_train_batch_size": 2, "logging_steps": 1}
    done = run("ppo", tmp_path, output_dir=tmp_path / "out", num_ppo_epochs=1, **settings)
    assert "rewards/short" in done.stdout
    assert weights(tmp_path / "out")


def test_cite_scores_the_questions_that_it_held_out(tmp_path: Path, tiny: Path) -> None:
    passages = [{"title": "A", "text": "one two"}, {"title": "B", "text": "three"}]
    rows = [{"question": f"say {c}?", "passages": passages, "answer": f"one {c} [1]."} for c in "abcdefgh"]
    file = write(tmp_path / "rows.jsonl", rows)
    settings = {"model_name_or_path": tiny, "dataset_name": file, "output_dir": tmp_path / "out", **RUN, **DYLORA}
    settings |= {"max_length": 1024, "passages": 2, "answer_tokens": 8, "held": 0.25}
    run("cite", tmp_path, **settings)
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    assert (tmp_path / "out" / "report.html").is_file()


BASE = ["--model_name_or_path", "x/y", "--dataset_name", "x/y"]
STREAM = ["--dataset_streaming", "true"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([*BASE, "--learning_rte", "1"], "--learning_rte is not known. Was --learning_rate meant?"),
        ([*BASE, "--adapter", "lora", "--ranks", "2"], "--ranks is not known with the adapter lora. It is one of"),
        ([*BASE, "--adapter", "dylra"], "adapter='dylra': there is no such method; there are adalora,"),
        ([*BASE, "--adapter"], "--adapter: name a method"),
        ([*BASE, "--adapter", "dylora", "--r", "8", "--ranks", "1,16"], "the largest of ranks must equal r"),
        ([*BASE, "--adapter", "dylora", "--lora_r", "8"], "the adapter's own name of it is r"),
        ([*BASE, "--adapter", "dylora", "--use_peft"], "use_peft asks for TRL's LoRA"),
        ([*BASE, "--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--dataset_name", "x/y"], "--model_name_or_path is missing"),
        ([*BASE, "--config", "nowhere.yaml"], "--config nowhere.yaml: [Errno 2]"),
        ([*BASE, "--curve_ranks", "2"], "pass --eval_strategy steps too"),
        ([*BASE, "--curve_ranks", "two", "--eval_strategy", "steps"], "must be whole numbers above 0"),
        ([*BASE, "--early_stopping_patience", "2"], "beside --load_best_model_at_end true"),
        ([*BASE, "--resume_from_checkpoint", "true"], "has no checkpoint. Leave it out to begin."),
        ([*BASE, "--resume_from_checkpoint", "x", "--overwrite", "true"], "pass one of them"),
        (
            [*BASE, *STREAM],
            "--dataset_streaming true: a stream's length is not known, so pass the steps too, as --max_",
        ),
        ([*BASE, "--report_to", "wandb"], "--report_to wandb: wandb is not installed. pip install wandb, or pass"),
        ([*BASE, "--report_to", "trackio"], "--report_to trackio: trackio is not installed. pip install trackio"),
        (
            [*BASE, "--report_to", "azure_ml"],
            "--report_to azure_ml: azureml.core is not installed. pip install azureml-sdk",
        ),
        ([*BASE, "--report_to", "neptune"], "--report_to neptune: neptune is not installed. pip install neptune, or"),
        ([*BASE, "--report_to", "flyte"], "--report_to flyte: flytekit is not installed. pip install flytekit, or"),
        ([*BASE, "--report_to", "dagshub"], "--report_to dagshub: dagshub is not installed. pip install dagshub, or"),
        (
            [*BASE, "--report_to", "kubeflow"],
            "the environment has no KUBEFLOW_TRAINER_SERVER_URL, which kubeflow needs.",
        ),
        ([*BASE, "--report_to", "wndb"], "--report_to wndb: there is no such logger. Pass none, all, or of azure_ml,"),
    ],
)
def test_a_slip_is_told_before_a_model_is_loaded(given: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_dynamic.cli import _before

    away = ("wandb", "trackio", "azureml.core", "neptune", "flytekit", "dagshub")
    installed = _before.has_package
    monkeypatch.setattr(_before, "has_package", lambda name: name not in away and installed(name))
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    result = invoke("sft", *given)
    assert result.exit_code == 2, result.output
    assert said in message(result)
    assert not Path("trainer_output").exists()


def test_what_dagshub_needs_beside_its_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_dynamic.cli import _before

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(_before, "has_package", lambda name: name != "mlflow")
    assert "dagshub: mlflow is not installed" in message(invoke("sft", *BASE, "--report_to", "dagshub"))
    monkeypatch.setattr(_before, "has_package", lambda name: True)
    assert "the environment has no MLFLOW_TRACKING_URI" in message(invoke("sft", *BASE, "--report_to", "dagshub"))


def test_what_each_logger_of_transformers_needs_is_known() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from peft_dynamic.cli._before import LOGGERS

    assert {*LOGGERS} == {*INTEGRATION_TO_CALLBACK}


def test_a_folder_with_another_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    result = invoke("sft", *BASE, "--output_dir", tmp_path / "out")
    assert result.exit_code == 2
    assert "holds checkpoint-3 of another run. Pass --resume_from_checkpoint true" in message(result)


@pytest.mark.parametrize(
    ("content", "said"),
    [("- a", "must have keys and values"), ("learning_rte: 1", "learning_rte is not known"), ("a: [", "--config")],
)
def test_a_file_that_is_wrong_is_told(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    result = invoke("sft", "--config", tmp_path / "run.yaml")
    assert result.exit_code == 2
    assert said in message(result)


def test_rows_that_cannot_be_had_are_told(tmp_path: Path, tiny: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    base = ["--model_name_or_path", tiny, "--output_dir", tmp_path / "out", "--dataset_name"]
    missing = invoke("sft", *base, rows, "--eval_strategy", "steps")
    assert missing.exit_code == 2
    assert "test: the data have no such split; there are train. Pass one of these, or pass --eval_data" in message(
        missing
    )
    assert "is not a file" in message(invoke("sft", *base, "nowhere.jsonl"))
    assert "--reward_funcs" in message(invoke("ppo", *base, rows))
    assert "nowhere.f: No module named" in message(invoke("ppo", *base, rows, "--reward_funcs", "nowhere.f"))
    assert "labels: the rows have no such column" in message(
        invoke("classify", *base, rows, "--label_column", "labels")
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["sft", "soft", "ppo", "cite", "classify"])
def test_help_shows_the_ten_options_that_matter_first(verb: str) -> None:
    shown = re.findall(r"^  (--\w+)  ", invoke(verb, "--help").output, re.MULTILINE)
    assert len(shown) == len({*shown}) == 10
    whole = invoke(verb, "--help-all", "--adapter", "dylora").output
    assert [option for option in shown if not re.search(rf"^ *{option}\b", whole, re.MULTILINE)] == []
    assert "'dylra': there is no such method" in message(invoke(verb, "--help-all", "--adapter", "dylra"))


def test_the_whole_list_of_options_has_the_adapters(tmp_path: Path) -> None:
    result = invoke("sft", "--help-all")
    assert result.exit_code == 0
    for option in (
        "--adapter",
        "--learning_rate",
        "--packing",
        "--load_in_4bit",
        "--assistant_only_loss",
        "--report_to",
    ):
        assert option in result.output


def test_train_writes_the_file_with_which_sft_gives_its_weights(tmp_path: Path, tiny: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    options = [
        "--model",
        tiny,
        "--data",
        rows,
        "--eval-data",
        rows,
        "--ranks",
        "1,2",
        "--steps",
        "6",
        "--batch-size",
        "2",
    ]
    done = forked("train", *options, "--output", tmp_path / "out", check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run("sft", tmp_path, config=tmp_path / "out" / "sft.yaml")
    ours, theirs = weights(tmp_path / "out" / "adapter"), weights(tmp_path / "out" / "sft")
    trained = [name for name in theirs if "lora_" in name]
    assert trained
    for name in trained:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("twice", [[], ["--overwrite", "true"]])
def test_the_command_that_goes_on_is_one_that_works(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, twice: list[str]
) -> None:
    import shlex
    import sys

    from trl import SFTConfig

    from peft_dynamic.cli import _fit
    from peft_dynamic.trainers.arguments import RunArguments

    recipe = _fit.Recipe(SFTConfig, lambda given: None, RunArguments)
    given = ["--model_name_or_path", str(tiny), "--dataset_name", "x/y", "--output_dir", str(tmp_path / "out"), *twice]

    def read(words: list[str]) -> Any:
        return _fit._given(_fit._parser("sft", recipe), recipe, words)

    monkeypatch.setattr(sys, "argv", ["peft-dynamic", "sft", *given])
    first = read(given)
    assert "Nothing was saved yet" in _fit._how_to_go_on(first)
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    again = _fit._how_to_go_on(first)
    assert "has all up to step 3" in again
    words = shlex.split(again.partition("Go on with: ")[2])
    second = read(words[2:])
    assert second.training.resume_from_checkpoint == str(tmp_path / "out" / "checkpoint-3")
    assert not second.script.overwrite
