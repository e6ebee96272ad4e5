"""`peft-dynamic compare`: several adapters, ranks and base models on the same rows."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_dynamic.cli._answer import JSON, UNFINISHED, answering
from peft_dynamic.cli._contender import Contender, parsed
from peft_dynamic.cli._data import Columns
from peft_dynamic.cli._given import (
    BATCH_SIZE,
    COMPLETION,
    FOUR_BIT,
    INSTRUCTION,
    LABEL,
    MAX_LENGTH,
    MODEL,
    PROMPT,
    TEXT,
    check_adapter,
    check_file,
    check_model,
    require,
)
from peft_dynamic.cli._subject import adapter_folder, check_product, largest_rank, read_config
from peft_dynamic.cli._task import LabelTask, RowOptions, TextTask, check_same_task, task_for


def compare(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapters, each whole or as ADAPTER@RANK or ADAPTER@SHARE; and the word base.")
    ],
    data: Annotated[str, typer.Option(help="Held-out rows, in the formats of train --data, or a classifier's.")],
    model: MODEL = None,
    out: Annotated[
        Path | None, typer.Option(help="The table in a file too: .json for what --json prints, or .md.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin nothing that would not fit in this time.")] = None,
    rows: Annotated[int | None, typer.Option(help="How many rows of --data. Default: all.", show_default=False)] = None,
    metric: Annotated[
        str | None, typer.Option(help="What to compare. Default: loss; of a classifier accuracy.", show_default=False)
    ] = None,
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
    """Compare adapters on the same rows: score with its interval, parameters, bytes, seconds and memory.

    The first one is what the others are compared with. A whole number after @ is a rank, another one up to 1 the share
    of the adapter's numbers that all modules have together.

    For example: peft-dynamic compare base runs/sql@4 runs/sql@0.25 other/adapter --data eval.jsonl
    """
    started = time.monotonic()
    require(minutes is None or 0 < minutes < math.inf, "--minutes", minutes, "above 0")
    listed = [parsed(word) for word in adapters]
    names = list(dict.fromkeys(each.adapter for each in listed if each.adapter))
    require(len({*adapters}) == len(adapters), "ADAPTERS", " ".join(adapters), "different ones")
    require(bool(names), "ADAPTERS", " ".join(adapters), "one adapter at least: base is the base model of one")
    require(len(listed) > 1, "ADAPTERS", adapters[0], "two or more, such as base and an adapter")
    for name in names:
        check_adapter(name, "ADAPTERS")
    if out is not None:
        require(out.suffix in (".json", ".md"), "--out", out, "a file that ends in .json or .md")
        check_file(out, "--out")
    if model is not None:
        check_model(model)
    columns = Columns(prompt_column, completion_column, text_column, instruction)
    given = RowOptions(data, columns, label_column, rows, max_length, batch_size)
    folders = {name: adapter_folder(name) for name in names}
    task = _task(listed, folders, given)
    known = [*task.metrics, *(["example_loss"] if isinstance(task, TextTask) else [])]
    require(metric is None or metric in known, "--metric", metric, f"one of {', '.join(known)}")
    from peft_dynamic.cli._compare import Comparing, run

    with answering(as_json) as answer:
        answer |= run(Comparing(listed, folders, task, model, four_bit, minutes, metric, started, out))
    if answer["missing"]:
        raise typer.Exit(UNFINISHED)


def _task(listed: list[Contender], folders: dict[str, Path], given: RowOptions) -> TextTask | LabelTask:
    """The rows, for which all adapters are fit."""
    written: dict[str, Any] = {name: read_config(folder) for name, folder in folders.items()}
    for each in listed:
        if each.adapter is None:
            continue
        check_product(written[each.adapter], each.adapter)
        most = largest_rank(written[each.adapter])
        rank = each.at.rank if each.at else None
        require((rank or 0) <= most, "ADAPTERS", each.word, f"at a rank of at most {most}, the largest of the adapter")
    first = next(iter(folders))
    task = task_for(written[first], given, first)
    for name in folders:
        check_same_task(written[name], task, name)
    return task
