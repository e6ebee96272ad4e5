"""What a training verb checks of its settings before a model is loaded: data, loggers, curves and the folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import typer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from peft_dynamic.cli._edge import has_package

LAST = "true"  # of --resume_from_checkpoint: whichever is the last
SAVED = ("adapter_config.json", "model.safetensors", "model.safetensors.index.json", "checkpoint-*")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# The packages that a logger needs, of those in one tuple one
_ALIKE = ("wandb", "trackio", "mlflow", "comet_ml", "clearml", "swanlab", "dvclive", "codecarbon", "neptune")
LOGGERS: dict[str, list[tuple[str, ...]]] = {
    **{name: [(name,)] for name in _ALIKE},
    "tensorboard": [("tensorboard", "tensorboardX")],
    "azure_ml": [("azureml.core",)],
    "dagshub": [("dagshub",), ("mlflow",)],
    "flyte": [("flytekit",)],
    "kubeflow": [],
}
PIP_NAMES = {"azureml.core": "azureml-sdk"}
# What the environment must say: transformers' callback fails on it after the model is loaded.
LOGGERS_ENVIRONMENT = {"kubeflow": "KUBEFLOW_TRAINER_SERVER_URL", "dagshub": "MLFLOW_TRACKING_URI"}


def numbers(text: str | None, name: str) -> list[int]:
    """Whole numbers with commas or blanks between them.

    Raises:
        ValueError: it is something else.
    """
    words = (text or "").replace(",", " ").split()
    if not all(word.isdigit() and int(word) > 0 for word in words) or (text is not None and not words):
        raise ValueError(f"--{name} {text}: must be whole numbers above 0 with commas between them, such as 2,8.")
    return [int(word) for word in words]


def check_curves(script: Any, training: Any) -> None:
    """Raise where curves or early stopping would have no evaluation to go by."""
    for name in ("curve_ranks", "curve_exits"):
        if numbers(getattr(script, name), name) and training.eval_strategy == "no":
            raise ValueError(f"--{name} measures at each evaluation: pass --eval_strategy steps too.")
    if script.curve_every < 1:
        raise ValueError(f"--curve_every {script.curve_every}: must be at least 1.")
    patience = script.early_stopping_patience
    if patience is not None and (patience < 1 or not training.load_best_model_at_end):
        raise ValueError(
            f"--early_stopping_patience {patience}: must be at least 1, beside --load_best_model_at_end true and "
            "--eval_strategy steps: it goes by the best checkpoint's metric."
        )


def check_output(script: Any, training: Any) -> None:
    """Raise where something in the folder would be lost or mixed up, or there is nothing to go on from."""
    folder, resume = Path(training.output_dir), training.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; pass a folder.")
    if resume is not None and script.overwrite:
        raise ValueError("--overwrite removes what --resume_from_checkpoint goes on from: pass one of them.")
    if str(resume).lower() in (LAST, "1", "yes"):
        found = checkpoints(folder)
        if not found:
            raise ValueError(f"--resume_from_checkpoint {resume}: {folder} has no checkpoint. Leave it out to begin.")
        training.resume_from_checkpoint = str(found[-1])
    elif str(resume).lower() in ("false", "0", "no"):
        training.resume_from_checkpoint = resume = None
    elif resume is not None and not Path(resume).is_dir():
        raise ValueError(f"--resume_from_checkpoint {resume}: there is no such folder. Pass a checkpoint's, or {LAST}.")
    if resume is None and not script.overwrite:
        there = [path.name for pattern in SAVED for path in sorted(folder.glob(pattern))]
        if there:
            raise ValueError(
                f"--output_dir {folder} holds {there[0]} of another run. Pass --resume_from_checkpoint {LAST} to go on "
                "with it, --overwrite true to replace it, or another folder."
            )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the last one at the end."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def check_data(verb: str, given: Any) -> None:
    """Raise where two sources of rows are named, or a stream would have no end."""
    script, mixture = given.script, given.mixture
    if mixture is not None and mixture.datasets and script.dataset_name:
        raise ValueError(
            f"--dataset_name {script.dataset_name} and a mixture under datasets: one of them is wanted. Leave one out."
        )
    mixed = mixture is not None and bool(mixture.datasets)
    name = "streaming" if mixed else "dataset_streaming"
    if not (mixture.streaming if mixed else script.dataset_streaming):
        return
    if verb == "ppo":
        raise ValueError(f"--{name} true: ppo reads its rows by number, which a stream does not have. Leave it out.")
    if verb != "cite" and given.training.max_steps <= 0:  # cite reads all rows to hold questions out
        raise ValueError(f"--{name} true: a stream's length is not known, so pass the steps too, as --max_steps 1000.")


def check_loggers(training: Any) -> None:
    """Raise for a logger that is not known, not installed or not set up."""
    for name in training.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"--report_to {name}: there is no such logger. Pass none, all, or of "
                f"{', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        for first, *others in LOGGERS.get(name, []):
            if not any(map(has_package, (first, *others))):
                raise ValueError(
                    f"--report_to {name}: {first} is not installed. pip install {PIP_NAMES.get(first, first)}, or pass "
                    "--report_to none."
                )
        variable = LOGGERS_ENVIRONMENT.get(name)
        if variable and not os.environ.get(variable):
            raise ValueError(
                f"--report_to {name}: the environment has no {variable}, which {name} needs. Set it, or pass "
                "--report_to none."
            )


def check_template(tokenizer: Any) -> None:
    """Raise where a chat template does not say which tokens are the assistant's."""
    from trl.chat_template_utils import get_training_chat_template

    if GENERATION.search(str(tokenizer.chat_template)):
        return
    try:  # TRL has such templates for some models
        get_training_chat_template(tokenizer)
    except ValueError as error:
        raise typer.BadParameter(
            f"true: the chat template of {tokenizer.name_or_path} has no {{% generation %}} around the assistant's "
            "turns, and TRL has none in its place. Pass a template with it as --chat_template_path, or leave it out.",
            param_hint="--assistant_only_loss",
        ) from error
