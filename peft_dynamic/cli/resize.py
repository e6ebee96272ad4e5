"""`peft-dynamic resize`: a finished LoRA adapter at a lower rank, or at ranks per module."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_dynamic.cli._answer import DRY_RUN, JSON, answering
from peft_dynamic.cli._data import Columns
from peft_dynamic.cli._given import (
    ADAPTER,
    BATCH_SIZE,
    COMPLETION,
    FOUR_BIT,
    INSTRUCTION,
    LABEL,
    MAX_LENGTH,
    MODEL,
    OUT,
    PROMPT,
    TEXT,
    Engine,
    bad_input,
    check_adapter,
    check_file,
    check_model,
    count_or_share,
    require,
)
from peft_dynamic.cli._subject import adapter_folder, check_product, largest_rank, read_config
from peft_dynamic.cli._task import RowOptions, task_for
from peft_dynamic.cli._written import check_place, described, place, tell


class Cut(StrEnum):
    """What a cut goes by."""

    auto = "auto"
    plain = "plain"
    inputs = "inputs"
    loss = "loss"


def resize(
    adapter: ADAPTER,
    out: OUT,
    rank: Annotated[int | None, typer.Option(help="The rank of every module.")] = None,
    parameters: Annotated[
        float | None, typer.Option(help="A share of the numbers up to 1, or a count: ranks per module for this budget.")
    ] = None,
    bytes: Annotated[int | None, typer.Option(help="The same for a size in bytes.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows to cut by, in the formats of train --data; loads the base model.")
    ] = None,
    rows: Annotated[int, typer.Option(help="How many rows of --data are used, drawn from all over it.")] = 64,
    moments: Annotated[
        Path | None, typer.Option(help="What is measured on --data: read if the file is there, else written to it.")
    ] = None,
    cut: Annotated[
        Cut, typer.Option(help="By the weights alone, by the modules' inputs, or by the loss too. auto: all there is.")
    ] = Cut.auto,
    damping: Annotated[float, typer.Option(help="How much of the plain cut is in one by data.")] = 0.1,
    engine: Annotated[
        Engine, typer.Option(help="Who reads it. For vllm and llama.cpp all modules are padded to the largest rank.")
    ] = Engine.peft,
    model: MODEL = None,
    prompt_column: PROMPT = "prompt",
    completion_column: COMPLETION = "completion",
    text_column: TEXT = None,
    label_column: LABEL = "label",
    instruction: INSTRUCTION = None,
    max_length: MAX_LENGTH = 512,
    batch_size: BATCH_SIZE = 8,
    four_bit: FOUR_BIT = False,
    dry_run: DRY_RUN = False,
    as_json: JSON = False,
) -> None:
    """Write any LoRA adapter at a lower rank, or with ranks per module for a budget; with --data by what it does there.

    For example: peft-dynamic resize runs/sql runs/sql-4 --rank 4 --data calibration.jsonl --moments sql.moments
    """
    check_adapter(adapter)
    size = _size(rank, parameters, bytes)
    _check_how(data, moments, cut, damping, model)
    folder = adapter_folder(adapter)
    written = read_config(folder)
    check_product(written, adapter)
    most = largest_rank(written)
    require((rank or 0) <= most, "--rank", f"rank={rank}", f"at most {most}, the largest rank of {adapter}")
    with bad_input("OUT"):
        check_place(out, folder)
    task = None
    if data is not None:
        columns = Columns(prompt_column, completion_column, text_column, instruction)
        given = RowOptions(data, columns, label_column, rows, max_length, batch_size)
        task = task_for(written, given, adapter)
    how: dict[str, Any] = {"engine": engine.value}
    with answering(as_json) as answer:
        if task is not None or moments is not None:
            found = _moments(adapter, folder, size, task, moments, model, four_bit)
            how |= {"moments": found, "cut": cut.value, "damping": damping}
        answer |= _write(adapter, folder, out, size, dry_run, **how)


def _check_how(data: str | None, moments: Path | None, cut: Cut, damping: float, model: str | None) -> None:
    """Stop where the options on what to cut by do not fit together."""
    require(0 <= damping < math.inf, "--damping", damping, "at least 0")
    by_data = data is not None or moments is not None
    if not by_data and cut in (Cut.inputs, Cut.loss):
        raise typer.BadParameter(f"{cut.value} needs --data, or --moments with a file.", param_hint="--cut")
    if by_data and cut == Cut.plain:
        raise typer.BadParameter("plain looks at no data. Leave it out, or --data and --moments.", param_hint="--cut")
    if moments is not None and not moments.is_file():
        check_file(moments, "--moments")
        if data is None:
            raise typer.BadParameter(
                f"{moments} is not there, and without --data nothing can be measured for it.", param_hint="--moments"
            )
    if model is not None and data is None:
        raise typer.BadParameter("without --data no base model is loaded. Leave it out.", param_hint="--model")
    if model is not None:
        check_model(model)


def _size(rank: int | None, parameters: float | None, bytes: int | None) -> dict[str, Any]:
    """The one of the three that is given, as `resize_adapter` takes it."""
    given = {"rank": rank, "parameters": parameters, "bytes": bytes}
    if sum(value is not None for value in given.values()) != 1:
        raise typer.BadParameter("pass one of the three, as --rank 8.", param_hint="--rank, --parameters, --bytes")
    require(rank is None or rank >= 1, "--rank", rank, "at least 1")
    require(bytes is None or bytes >= 1, "--bytes", bytes, "at least 1")
    if parameters is not None:
        return {"parameters": count_or_share(parameters)}
    return {name: value for name, value in given.items() if value is not None}


def _check(read: Any, size: dict[str, Any]) -> None:
    """Stop where the adapter has no such rank: before minutes of measuring, not after."""
    from peft_dynamic.algebra.resize import wanted_ranks

    with bad_input(f"--{next(iter(size))}"):
        wanted_ranks(read, **{"rank": None, "parameters": None, "bytes": None, **size})


def _write(adapter: str, folder: Path, out: Path, size: dict[str, Any], dry_run: bool, **how: Any) -> dict[str, Any]:
    """Write it, and say what it is; the same as an answer for other programs."""
    from peft_dynamic.algebra import resize_adapter
    from peft_dynamic.algebra.checkpoint import read_checkpoint
    from peft_dynamic.algebra.stock import is_calibrated

    with bad_input("ADAPTER"):
        read = read_checkpoint(folder)
    _check(read, size)
    with bad_input(), place(out, dry_run, folder) as target:
        resize_adapter(folder, target, **size, **how)
        after = read_checkpoint(target)
        about = described(target)
    gone = len(read.products) - len(after.products)
    answer = {"out": str(out), "written": not dry_run, "of": read.size, "left_out": gone, **about}
    if dry_run:
        tell(answer, out)
        return answer
    typer.echo(f"{out} has {after.size:,} of the {read.size:,} numbers of {adapter}, as a stock LoRA adapter.")
    ranks = sorted({product.rank for product in after.products.values()})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    if "moments" not in how and is_calibrated(folder):
        typer.echo(
            f"{adapter} was calibrated, and this cut goes by its weights alone. For the ranks that it has itself: "
            "peft-dynamic export ADAPTER OUT --rank."
        )
    typer.echo(f"Its modules have {span}{f'; {gone} of {len(read.products)} got none' if gone else ''}.")
    return answer


def _moments(
    adapter: str,
    folder: Path,
    size: dict[str, Any],
    task: Any,
    file: Path | None,
    model: str | None,
    four_bit: bool,
) -> Any:
    """The moments to cut by: out of the file if it is there, else measured, and then written to it."""
    from peft_dynamic.cli import _moments as kept
    from peft_dynamic.cli._subject import subject

    found = subject(adapter, folder, model, four_bit, loads=file is None or not file.is_file())
    _check(found.read, size)
    if file is not None and file.is_file():
        return kept.load(file, found, task)
    if task.unused:
        typer.echo(f"Columns that are not read: {', '.join(task.unused)}.")
    moments = kept.measure(found, task)
    if file is not None:
        kept.save(moments, file, found, task)
        typer.echo(f"They are in {file}. Another resize of this adapter with --moments {file} needs no base model.")
    return moments
