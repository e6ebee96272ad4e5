"""`peft-dynamic sft`: TRL's SFTTrainer with any adapter, by TRL's names of its settings."""

from __future__ import annotations

from typing import Any

import typer

from peft_dynamic.cli import _recipe

VERB = _recipe.Verb(
    "sft",
    "Fine-tune a language model on texts, on prompts with completions, or on chats, with TRL's SFTTrainer and any "
    "adapter. Several processes: accelerate launch -m peft_dynamic.cli sft ...",
    (
        *(_recipe.MODEL, _recipe.DATA, _recipe.ADAPTER, _recipe.RANKS, _recipe.OUTPUT, _recipe.CONFIG),
        *(_recipe.RATE, _recipe.STEPS, _recipe.BATCH, _recipe.RESUME),
    ),
    "--model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name my.jsonl --adapter dylora --r 8 "
    "--ranks 1,2,4,8 --target_modules all-linear --learning_rate 5e-4 --output_dir out/sft",
)


def sft(context: typer.Context) -> None:
    """Fine-tune a language model with TRL's SFTTrainer and any adapter; --config takes a YAML file.

    For example: peft-dynamic sft --config sft.yaml
    """
    VERB.run(context.args, _build)


def _build() -> Any:
    from trl import DatasetMixtureConfig, SFTConfig, SFTTrainer

    from peft_dynamic.cli import _fit
    from peft_dynamic.trainers.arguments import RunArguments

    return _fit.Recipe(SFTConfig, _fit.supervised(SFTTrainer), RunArguments, mixture=DatasetMixtureConfig)
