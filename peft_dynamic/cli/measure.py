"""`peft-dynamic measure`: what each rank of a finished adapter is worth on rows of yours, and which to keep."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer

from peft_dynamic.cli._answer import JSON, UNFINISHED, answering
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
    PROMPT,
    TEXT,
    check_file,
    check_model,
    check_picture,
    require,
)
from peft_dynamic.cli._subject import adapter_folder, check_product, largest_rank, read_config
from peft_dynamic.cli._task import LabelTask, RowOptions, TextTask, task_for


def measure(
    adapter: ADAPTER,
    data: Annotated[str, typer.Option(help="Held-out rows, in the formats of train --data, or a classifier's.")],
    ranks: Annotated[
        str | None,
        typer.Option(help="As 1,2,4. Default: those that were trained; of a LoRA powers of two.", show_default=False),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Ranks per module: shares of the numbers, or counts, as 0.25,100000.", show_default=False),
    ] = None,
    model: MODEL = None,
    out: Annotated[
        Path | None, typer.Option(help="The curve as JSON, row by row; a second call goes on with it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it: a file that ends in .png, .svg or .pdf.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no row that would not fit in this time.")] = None,
    rows: Annotated[int | None, typer.Option(help="How many rows of --data. Default: all.", show_default=False)] = None,
    moments: Annotated[
        Path | None, typer.Option(help="Cut by what resize --moments wrote of this adapter.", show_default=False)
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="What to choose by. Default: loss; of a classifier accuracy.", show_default=False)
    ] = None,
    tolerance: Annotated[float, typer.Option(help="How much of the best rank's gain may be lost.")] = 0.01,
    prompt_column: PROMPT = "prompt",
    completion_column: COMPLETION = "completion",
    text_column: TEXT = None,
    label_column: LABEL = "label",
    instruction: INSTRUCTION = None,
    max_length: MAX_LENGTH = 512,
    batch_size: BATCH_SIZE = 8,
    four_bit: FOUR_BIT = False,
    as_json: JSON = False,
) -> None:
    """Measure a LoRA or DyLoRA adapter at each rank, and its base model, and say which rank is enough.

    For example: peft-dynamic measure runs/sql --data eval.jsonl --ranks 1,2,4,8 --out curve.json --minutes 30
    """
    started = time.monotonic()
    require(minutes is None or 0 < minutes < math.inf, "--minutes", minutes, "above 0")
    require(0 <= tolerance < math.inf, "--tolerance", tolerance, "at least 0; 0.01 is one per cent")
    listed, shares = _ranks(ranks), _budgets(budgets)
    folder = adapter_folder(adapter)
    require(moments is None or moments.is_file(), "--moments", moments, "a file that resize --moments wrote")
    if out is not None:
        check_file(out, "--out")
    if plot is not None:
        check_picture(plot)
    if model is not None:
        check_model(model)
    columns = Columns(prompt_column, completion_column, text_column, instruction)
    given = RowOptions(data, columns, label_column, rows, max_length, batch_size)
    task = _task(adapter, folder, given, listed)
    require(metric is None or metric in task.metrics, "--metric", metric, f"one of {', '.join(task.metrics)}")
    from peft_dynamic.cli._curve import Curving, run
    from peft_dynamic.cli._subject import subject

    with answering(as_json) as answer:
        found = subject(adapter, folder, model, four_bit)
        answer |= run(Curving(found, task, listed, shares, out, plot, minutes, metric, tolerance, started, moments))
    if answer["missing"]:
        raise typer.Exit(UNFINISHED)


def _task(adapter: str, folder: Path, given: RowOptions, ranks: list[int] | None) -> TextTask | LabelTask:
    """The rows, for an adapter that has these ranks."""
    written = read_config(folder)
    check_product(written, adapter)
    above, most = max(ranks or [0]), largest_rank(written)
    require(above <= most, "--ranks", above, f"at most {most}, the largest rank of {adapter}")
    return task_for(written, given, adapter)


def _ranks(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        listed = [int(word) for word in text.split(",")]
    except ValueError:
        listed = [0]
    require(min(listed) >= 1, "--ranks", repr(text), "whole numbers of at least 1, such as 1,2,4,8")
    return sorted(set(listed))


def _budgets(text: str | None) -> list[int | float]:
    if text is None:
        return []
    rule = "shares above 0 and up to 1, or whole numbers, such as 0.25,100000"
    found: list[int | float] = []
    for word in text.split(","):
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        whole = value > 1 and value.is_integer()
        require(0 < value <= 1 or whole, "--budgets", repr(text), rule)
        found.append(int(value) if whole else value)
    return sorted(set(found))
