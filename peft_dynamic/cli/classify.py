"""`peft-dynamic classify`: a classifier or a regression over one text or two, with transformers' Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import typer

from peft_dynamic.cli import _recipe

VERB = _recipe.Verb(
    "classify",
    "Train a classifier of one text or two, or a regression, with transformers' Trainer and any adapter. The head is "
    "trained too, and saved with the adapter.",
    (
        *(_recipe.MODEL, _recipe.DATA, ("--text_columns", "The column of text, or two as a,b. Default: all of text.")),
        *(("--label_column", "The column of labels: names, numbers from 0, or values with a decimal point."),),
        *(_recipe.ADAPTER, _recipe.RANKS, _recipe.OUTPUT, _recipe.CONFIG, _recipe.RATE, _recipe.STEPS),
    ),
    "--model_name_or_path answerdotai/ModernBERT-base --dataset_name train.jsonl --adapter dylora --r 8 "
    "--ranks 1,2,4,8 --learning_rate 1e-3 --output_dir out/classify",
)


def classify(context: typer.Context) -> None:
    """Train a classifier of texts, or a regression, with any adapter; --config takes a YAML file.

    For example: peft-dynamic classify --config classify.yaml
    """
    VERB.run(context.args, _build)


def _build() -> Any:
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
    from trl import get_quantization_config

    from peft_dynamic.cli import _classes, _fit
    from peft_dynamic.trainers.arguments import RunArguments

    @dataclass
    class ClassifyArguments(RunArguments):
        text_columns: str | None = field(
            default=None, metadata={"help": "The column of text, or two as a,b; None for all columns of text."}
        )
        label_column: str = field(default="label", metadata={"help": "The column of labels."})
        max_length: int = field(default=512, metadata={"help": "Longer texts are cut to this many tokens."})

    def trainer(given: _fit.Given) -> Any:
        train, evaluation = _fit.data(given)
        script = given.script
        tokenizer = _fit.tokenizer(given)
        labels = _classes.Labels.of(train, script.label_column)
        columns = _classes.text_columns(train, script.text_columns, script.label_column)
        settings = _fit.model_settings(given) | {"quantization_config": get_quantization_config(given.model)}
        model, random = _classes.load(given.model.model_name_or_path, labels, tokenizer, given.training.seed, settings)
        if given.peft_config is not None:
            from peft import get_peft_model

            _classes.save_random(given.peft_config, random)
            model = get_peft_model(model, given.peft_config)

        def encoded(rows: Any) -> Any:
            return None if rows is None else labels.encoded(rows, columns, tokenizer, script.max_length)

        texts = encoded(train)
        _classes.check_ends(model.config, texts, tokenizer)
        made = Trainer(
            model,
            given.training,
            train_dataset=texts,
            eval_dataset=encoded(evaluation),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=labels.metrics,
        )
        given.more["evaluate"] = lambda model: _classes.measured(made, model)
        return made

    return _fit.Recipe(TrainingArguments, trainer, ClassifyArguments, task_type="SEQ_CLS")
