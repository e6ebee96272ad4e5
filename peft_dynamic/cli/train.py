"""`peft-dynamic train`: fine-tune once with DyLoRA, measure every rank, export the one to keep.

Everything that can be checked without a model is checked before one is loaded.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_dynamic.cli._data import Columns, Example, read_rows, to_examples, unused_columns
from peft_dynamic.cli._edge import require_package
from peft_dynamic.cli._given import check_model, command_line, require
from peft_dynamic.cli._identity import FILES, FOLDERS, NAME, checkpoints, differences, identity, read
from peft_dynamic.cli._interrupt import Interrupted, Interruption
from peft_dynamic.cli._job import Job

DEMO_INSTRUCTION = "Describe this place in a sentence or two."
# Sized for a few minutes on two cores; where others use them too, the minutes bound it instead.
DEMO_STEPS, DEMO_RATE, DEMO_MINUTES = 50, 3e-3, 8.0


def train(
    demo: Annotated[
        bool, typer.Option("--demo", help="Train SmolLM2-135M-Instruct on the E2E NLG excerpt that comes along.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="The base model: a folder, or a name on the Hub.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSON lines, a JSON list, CSV, TSV, Parquet, Arrow, a saved dataset, or a Hub dataset (user/name).",
            show_default=False,
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out rows, as --data. Default: a tenth of --data, at most 200 rows.")
    ] = None,
    prompt_column: Annotated[str, typer.Option(help="Column of what is given.")] = "prompt",
    completion_column: Annotated[str, typer.Option(help="Column of what is learnt.")] = "completion",
    text_column: Annotated[str | None, typer.Option(help="Column of plain text, all of which is learnt.")] = None,
    instruction: Annotated[str | None, typer.Option(help="A line to put before each prompt.")] = None,
    r: Annotated[int | None, typer.Option("--r", help="The largest rank. Default: the last of --ranks.")] = None,
    ranks: Annotated[
        str | None, typer.Option(help="The ranks to train, as 1,2,4. Default: powers of two up to --r, or to 32.")
    ] = None,
    lora_alpha: Annotated[float, typer.Option(help="As in LoRA of rank --r; with --paper, over the rank in use.")] = 16,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="The paper's rules: a rank is the first rows and columns, not the leading singular components; "
            "the scale is alpha/b; all ranks are drawn equally often, not the largest in 3 steps of 4.",
        ),
    ] = False,
    target_modules: Annotated[str, typer.Option(help="all-linear, or names as q_proj,v_proj.")] = "all-linear",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: as many as --epochs have.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data, if --steps is not given.")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 8,
    learning_rate: Annotated[float | None, typer.Option(help="The peak. Default: 5e-4; 3e-3 in the demo.")] = None,
    max_length: Annotated[int, typer.Option(help="Longer examples are cut to this many tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the data's order, the adapter's start and the ranks.")] = 0,
    four_bit: Annotated[bool, typer.Option("--4bit", help="Quantise the base model to 4 bits (QDyLoRA).")] = False,
    tolerance: Annotated[float, typer.Option(help="How much of the best rank's gain may be lost.")] = 0.01,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            help="Time for the whole command: load, train, measure, export, check. Default: no limit; 8 in the demo."
        ),
    ] = None,
    save_steps: Annotated[
        int | None,
        typer.Option(help="Keep a checkpoint of every so many steps. Default: every fifth of the run, until it ends."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    output: Annotated[Path, typer.Option(help="The folder to write.")] = Path("peft-dynamic-out"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --output: its adapter, report and checkpoints.")
    ] = False,
) -> None:
    """Fine-tune a model once, see how good each rank is, and export the smallest that is good enough.

    For example: peft-dynamic train --model my/model --data my.jsonl --ranks 1,2,4,8,16
    """
    started = time.monotonic()
    _check_numbers(steps, epochs, batch_size, learning_rate, max_length, seed, tolerance, max_minutes, save_steps)
    for value, option in ((data, "--data"), (model, "--model")):
        if value is None and not demo:
            raise typer.BadParameter("missing. Pass one, or --demo to see how it works.", param_hint=option)
    _check_output(output, resume, overwrite, demo)
    if four_bit:
        require_package("bitsandbytes", "--4bit", "quant")
    interruption = Interruption()
    with interruption.watched():
        try:
            columns = Columns(prompt_column, completion_column, text_column, instruction)
            if data is None:
                from peft_dynamic.data import E2E_TRAIN, E2E_VALIDATION

                data, eval_data = str(E2E_TRAIN), eval_data or str(E2E_VALIDATION)
                columns = Columns("mr", "ref", None, instruction or DEMO_INSTRUCTION)
            rows = read_rows(data, "--data")
            examples = to_examples(rows, columns, data, "--data")
            if eval_data is None:
                examples, held_out = _split(examples, seed)
            else:
                held_out = to_examples(read_rows(eval_data, "--eval-data"), columns, eval_data, "--eval-data")
            job = Job(
                model=_model(model),
                data=data,
                eval_data=eval_data,
                examples=examples,
                held_out=held_out,
                unused=unused_columns(rows, columns),
                config=dylora_config(r, ranks, lora_alpha, target_modules, seed, four_bit, paper),
                four_bit=four_bit,
                steps=steps or (DEMO_STEPS if demo else -1),
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate or (DEMO_RATE if demo else 5e-4),
                max_length=max_length,
                seed=seed,
                tolerance=tolerance,
                max_minutes=max_minutes or (DEMO_MINUTES if demo else None),
                save_steps=save_steps,
                output=output,
                started=started,
                interruption=interruption,
            )
            if resume:
                job.resume = _resumable(job)
            from peft_dynamic.cli._run import run

            run(job)
        except Interrupted:
            typer.echo(f"Stopped. {_how_to_go_on(output)}", err=True)
            raise typer.Exit(128 + interruption.number) from None


def _check_numbers(
    steps: int | None,
    epochs: float,
    batch_size: int,
    learning_rate: float | None,
    max_length: int,
    seed: int,
    tolerance: float,
    max_minutes: float | None,
    save_steps: int | None,
) -> None:
    require(steps is None or steps >= 1, "--steps", steps, "at least 1")
    require(0 < epochs < math.inf, "--epochs", epochs, "above 0")
    require(batch_size >= 1, "--batch-size", batch_size, "at least 1")
    require(learning_rate is None or 0 < learning_rate < math.inf, "--learning-rate", learning_rate, "above 0")
    require(max_length >= 8, "--max-length", max_length, "at least 8 tokens")
    require(0 <= seed < 2**32, "--seed", seed, "at least 0 and below 2^32")
    require(0 <= tolerance < math.inf, "--tolerance", tolerance, "at least 0; 0.01 is one per cent")
    require(max_minutes is None or max_minutes > 0, "--max-minutes", max_minutes, "above 0")
    require(save_steps is None or save_steps >= 0, "--save-steps", save_steps, "at least 0")


def _check_output(output: Path, resume: bool, overwrite: bool, demo: bool) -> None:
    """Raise unless the folder can be written, and nothing that is in it would be lost or mixed up."""
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise typer.BadParameter(f"{there} is a file; pass a folder.", param_hint="--output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"nothing can be written in {there}; pass another folder.", param_hint="--output")
    found = checkpoints(output)
    if resume and overwrite:
        raise typer.BadParameter("--overwrite removes what it goes on from: pass one of them.", param_hint="--resume")
    if resume and not found:
        raise typer.BadParameter(
            f"{output} has no checkpoints to go on from. A run that ends by itself removes them, unless --save-steps "
            "is given.",
            param_hint="--resume",
        )
    if overwrite or demo or resume:
        return
    if (output / "adapter").exists():
        raise typer.BadParameter(
            f"{output} holds an adapter already. Pass another folder, or --overwrite to replace it.",
            param_hint="--output",
        )
    if found:
        raise typer.BadParameter(
            f"{output} holds the checkpoints of a run. Pass --resume to go on with it, --overwrite to remove it, or "
            "another folder.",
            param_hint="--output",
        )
    there_already = [name for name in (*FILES, *FOLDERS) if (output / name).exists()]
    if there_already and NAME not in there_already:  # with it they are what a run of ours left that did not train
        raise typer.BadParameter(
            f"{output} holds {', '.join(there_already)}, which would be replaced. Pass another folder, or --overwrite.",
            param_hint="--output",
        )


def _resumable(job: Job) -> bool:
    """Raise unless the folder holds this very run."""
    try:
        then = read(job.output)
    except ValueError as error:
        raise typer.BadParameter(f"{error}. Start again with --overwrite.", param_hint="--resume") from error
    if changed := differences(then["run"], identity(job)):
        raise typer.BadParameter(
            f"{job.output} holds another run: {'; '.join(changed)}. Pass what it was started with, or start again with "
            "--overwrite.",
            param_hint="--resume",
        )
    return True


def _how_to_go_on(output: Path) -> str:
    """After an interruption: what is there, and the command that goes on."""
    again = command_line("--resume", "--overwrite")
    if found := checkpoints(output):
        return f"{output} has all up to step {found[0].name.rpartition('-')[2]}. Go on with: {again} --resume"
    left = f"{output} has no checkpoint yet" if (output / NAME).exists() else "Nothing was written"
    return f"{left}. Start again with: {again}"


def _split(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Nine tenths to train on, and one tenth, at most 200, to measure with."""
    import random

    if len(examples) < 2:
        raise typer.BadParameter(
            "one row is not enough to hold some out. Add rows, or pass --eval-data.", param_hint="--data"
        )
    shuffled = random.Random(seed).sample(examples, len(examples))
    held = min(max(len(examples) // 10, 1), 200)
    return shuffled[held:], shuffled[:held]


def dylora_config(
    r: int | None, ranks: str | None, lora_alpha: float, target_modules: str, seed: int, four_bit: bool, paper: bool
) -> Any:
    """The adapter's configuration that the options ask for.

    Raises:
        typer.BadParameter: they fit no adapter.
    """
    from peft_dynamic import DyLoRAConfig, QDyLoRAConfig
    from peft_dynamic.functional.ranks import usual_ranks

    listed = None
    if ranks is not None:
        try:
            listed = [int(rank) for rank in ranks.split(",")]
        except ValueError as error:
            raise typer.BadParameter(
                f"{ranks!r}: must be whole numbers, such as 1,2,4,8.", param_hint="--ranks"
            ) from error
    largest = r if r is not None else listed[-1] if listed else 32
    if listed is None and largest >= 1:
        listed = usual_ranks(largest)
    modules = target_modules if target_modules == "all-linear" else [name.strip() for name in target_modules.split(",")]
    alpha: Any = int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha  # typed as int, any number works
    kind = QDyLoRAConfig if four_bit else DyLoRAConfig
    build: Any = kind.paper if paper else kind
    try:
        return build(
            r=largest,
            ranks=listed,
            lora_alpha=alpha,
            target_modules=modules,
            rank_seed=seed,
            task_type="CAUSAL_LM",
        )
    except (ValueError, TypeError) as error:  # its message names the field, the value and the rule
        raise typer.BadParameter(str(error), param_hint="--ranks, --r or --lora-alpha") from error


def _model(model: str | None) -> str:
    """The base model as `from_pretrained` takes it, fetched where it is the demo's."""
    if model is None:
        from peft_dynamic.cli.models import FetchError, fetch

        try:
            return str(fetch("smollm2"))
        except FetchError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error
    return check_model(model)
