"""`peft-dynamic soft`: one run for many depths, with SoFTTrainer."""

from __future__ import annotations

from typing import Any

import typer

from peft_dynamic.cli import _recipe

VERB = _recipe.Verb(
    "soft",
    "Fine-tune a language model so that it can be left after fewer layers, with SoFTTrainer, which is TRL's SFTTrainer "
    "for many depths. With or without an adapter.",
    (
        *(
            _recipe.MODEL,
            _recipe.DATA,
            ("--exits", "Depths to train, in layers, as 12,18,24,30: the whole too."),
        ),
        *(_recipe.ADAPTER, _recipe.OUTPUT, _recipe.CONFIG, _recipe.RATE, _recipe.STEPS),
        *(_recipe.BATCH, _recipe.RESUME),
    ),
    "--model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name my.jsonl --exits 12,18,24,30 "
    "--output_dir out/soft",
)


def soft(context: typer.Context) -> None:
    """Fine-tune a language model for many depths at once; --config takes a YAML file.

    For example: peft-dynamic soft --config soft.yaml
    """
    VERB.run(context.args, _build)


def _build() -> Any:
    from trl import DatasetMixtureConfig

    from peft_dynamic.cli import _fit
    from peft_dynamic.trainers.arguments import RunArguments
    from peft_dynamic.trainers.soft.config import SoFTConfig
    from peft_dynamic.trainers.soft.trainer import SoFTTrainer

    return _fit.Recipe(SoFTConfig, _fit.supervised(SoFTTrainer), RunArguments, mixture=DatasetMixtureConfig)
