"""`peft-dynamic cite`: teach a decoder to answer from passages with citations, and score what it says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from peft_dynamic.cli import _recipe

VERB = _recipe.Verb(
    "cite",
    "Teach a decoder to answer from passages and to cite them, with TRL's SFTTrainer. Questions that are held out are "
    "answered in the end; the answers and their scores are in answers.jsonl and report.html.",
    (
        *(_recipe.MODEL, ("--dataset_name", "Rows with question, passages and an answer that cites them, as [1][2].")),
        *(("--passages", "Passages of each row: filled up or cut down to it."), ("--judge", "A model of entailment.")),
        *(_recipe.ADAPTER, _recipe.OUTPUT, _recipe.CONFIG, _recipe.RATE, _recipe.STEPS, _recipe.BATCH),
    ),
    "--model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name cited.jsonl --adapter dylora --r 16 "
    "--target_modules all-linear --learning_rate 5e-4 --output_dir out/cite",
)


def cite(context: typer.Context) -> None:
    """Teach a decoder to cite its sources, and score its citations; --config takes a YAML file.

    For example: peft-dynamic cite --config cite.yaml
    """
    VERB.run(context.args, _build)


def _build() -> Any:
    from trl import SFTConfig, SFTTrainer, get_quantization_config

    from peft_dynamic.cli import _fit
    from peft_dynamic.trainers import citation_prompt_completion
    from peft_dynamic.trainers.arguments import RunArguments

    @dataclass
    class CiteArguments(RunArguments):
        passages: int = field(default=5, metadata={"help": "Passages of each row: filled up or cut down to it."})
        out_of_range: str = field(
            default="drop", metadata={"help": "Answers with ids of no passage.", "choices": ["drop", "repair"]}
        )
        format: str = field(default="alce", metadata={"help": "The form of the prompt.", "choices": ["alce", "citer"]})
        held: float = field(default=0.1, metadata={"help": "The share of the questions that is kept for the scores."})
        answer_tokens: int = field(default=200, metadata={"help": "The most tokens of an answer to these."})
        judge: str | None = field(default=None, metadata={"help": "A model of entailment, for the citations' scores."})

    def trainer(given: _fit.Given) -> Any:
        train, test = _questions(given)
        tokenizer = _fit.tokenizer(given)
        given.more |= {"test": test, "shape": {"format": given.script.format, "max_length": given.training.max_length}}
        given.training.model_init_kwargs = _fit.model_settings(given)
        rows = citation_prompt_completion(train, tokenizer, **given.more["shape"])
        evaluated = given.training.eval_strategy != "no"
        held = citation_prompt_completion(test, tokenizer, **given.more["shape"]) if evaluated else None
        return SFTTrainer(
            given.model.model_name_or_path,
            given.training,
            train_dataset=rows,
            eval_dataset=held,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(given.model),
            peft_config=given.peft_config,
        )

    return _fit.Recipe(SFTConfig, trainer, CiteArguments, after=_answer)


def _questions(given: Any) -> tuple[Any, Any]:
    """The rows to train on, and those whose questions are held out."""
    import random

    from peft_dynamic.cli import _fit
    from peft_dynamic.trainers import build_citation_dataset

    script = given.script
    if not 0 < script.held < 1:
        raise typer.BadParameter(f"{script.held}: must be above 0 and below 1; 0.1 is a tenth.", param_hint="--held")
    loaded, _ = _fit.data(given, evaluated=False)
    dataset, report = build_citation_dataset(
        loaded.to_list(), passages=script.passages, out_of_range=script.out_of_range, seed=given.training.seed
    )
    typer.echo(str(report))
    questions = sorted({*dataset["question"]})
    if len(questions) < 2:
        raise typer.BadParameter(
            f"{len(questions)} questions are left, and one at least is held out. Add rows.", param_hint="--dataset_name"
        )
    count = min(len(questions) - 1, max(1, round(script.held * len(questions))))
    held = {*random.Random(given.training.seed).sample(questions, count)}
    train = dataset.filter(lambda row: row["question"] not in held)
    return train, dataset.filter(lambda row: row["question"] in held)


def _answer(given: Any, trainer: Any) -> None:
    """Answer the questions that were held out, and score the answers."""
    from peft_dynamic.trainers import CitationDataCollator, answer_questions, evaluate_citations

    if not trainer.accelerator.is_main_process:
        return
    collator = CitationDataCollator(trainer.processing_class, **given.more["shape"])
    test, model = given.more["test"].to_list(), trainer.accelerator.unwrap_model(trainer.model)
    texts = answer_questions(model, collator, test, max_new_tokens=given.script.answer_tokens)
    answered = [{**row, "output": text} for row, text in zip(test, texts, strict=True)]
    folder = Path(given.training.output_dir)
    lines = "".join(json.dumps(row) + "\n" for row in answered)
    (folder / "answers.jsonl").write_text(lines, encoding="utf-8")
    evaluation = evaluate_citations(answered, given.script.judge)
    evaluation.report(folder / "report.html")
    typer.echo(evaluation.table())
    typer.echo(f"The answers are in {folder / 'answers.jsonl'} and, to look at, in {folder / 'report.html'}.")
