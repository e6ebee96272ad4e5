"""What an adapter's factors see of rows, for a cut by data: measured once, kept in a file, and read again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import typer

from peft_dynamic.cli import _load
from peft_dynamic.cli._given import bad_input
from peft_dynamic.cli._identity import differences
from peft_dynamic.cli._subject import Subject
from peft_dynamic.cli._task import LabelTask, TextTask

KEY = "peft_dynamic_resize"  # in the file's header: whose moments they are


def measure(subject: Subject, task: TextTask | LabelTask) -> Any:
    """The moments of an adapter over the rows of a task, with its base model loaded; what was done is printed."""
    from peft_dynamic.algebra import adapter_moments

    started = time.monotonic()
    # as the stock LoRA that will be cut: its factors are then those of the file, whatever method the adapter is of
    model, tokenizer = subject.load(task, _load.fast_dtype(), stock=True)
    batches, notes = task.batches(model, tokenizer)
    for note in notes:
        typer.echo(note)
    on_device = ({key: value.to(_load.device(model)) for key, value in batch.items()} for batch in batches)
    begun = time.monotonic()
    with bad_input("--data"):
        moments = adapter_moments(model, on_device)
    now = time.monotonic()
    typer.echo(
        f"{moments.tokens:,} tokens of {len(task.examples)} rows measured in {now - begun:.1f} s, and "
        f"{begun - started:.1f} s to load {subject.base}."
    )
    return moments


def save(moments: Any, path: Path, subject: Subject, task: TextTask | LabelTask) -> None:
    """Write them, whole or not at all, with whose they are in the header."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    beside = path.with_name(f".{path.name}.new")
    moments.save(beside)
    with safe_open(beside, framework="pt") as file:
        header = file.metadata()
    about = {**subject.identity(), "data": task.identity()}
    save_file(load_file(beside), beside, metadata={**header, KEY: json.dumps(about)})
    os.replace(beside, path)


def load(path: Path, subject: Subject, task: TextTask | LabelTask | None) -> Any:
    """Read them.

    Args:
        path: the file.
        subject: the adapter that is to be cut; its base model need not be there.
        task: the rows that were given, if any.

    Raises:
        typer.BadParameter: the file holds none, or those of another adapter or of other rows.
    """
    from safetensors import SafetensorError, safe_open

    from peft_dynamic.algebra import AdapterMoments

    try:
        moments = AdapterMoments.load(path)
        with safe_open(path, framework="pt") as file:
            then = json.loads(file.metadata().get(KEY, "null"))
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise typer.BadParameter(
            f"{path} holds no moments of an adapter. Pass a file that resize wrote, or the name of a new one.",
            param_hint="--moments",
        ) from error
    if then is None:  # written in Python
        return moments
    now = {**then, "adapter": subject.identity()["adapter"], **({"data": task.identity()} if task else {})}
    if changed := differences(then, now):
        raise typer.BadParameter(
            f"{path} holds the moments of something else: {'; '.join(changed)}. Pass another file, or remove it.",
            param_hint="--moments",
        )
    return moments
