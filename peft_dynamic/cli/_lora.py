"""What `peft-dynamic export` does for a stock LoRA: by the adapter's files, without the base model's weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from peft import PeftConfig

import peft_dynamic.tuners  # noqa: F401  # registers the adapter types
from peft_dynamic.algebra.checkpoint import LoraCheckpoint, read_checkpoint, write_checkpoint
from peft_dynamic.algebra.stock import needs_order, stock_checkpoint, untold
from peft_dynamic.cli._edge import UserError, blame
from peft_dynamic.cli._gguf import LORA, convert, converter
from peft_dynamic.cli._given import bad_input
from peft_dynamic.cli._tokenizer import base_folder, tokenizer_files
from peft_dynamic.cli._wanted import Wanted
from peft_dynamic.cli._written import described

AGAIN = "Save the adapter again, or take another copy."


def configuration(wanted: Wanted) -> Any:
    """The adapter's configuration.

    Raises:
        UserError: it is damaged.
    """
    path = wanted.folder / "adapter_config.json"
    with blame(f"{path} is no configuration of an adapter", AGAIN):
        return PeftConfig.from_pretrained(str(wanted.folder))


def write_lora(wanted: Wanted) -> dict[str, Any]:
    """Write it, and say what it is. A GGUF file comes first: if it fails, the folder stays as it was."""
    config = configuration(wanted)
    base = wanted.model or config.base_model_name_or_path
    script = converter(LORA, wanted.llama_cpp) if wanted.gguf else None
    made, beside = _checkpoint(wanted, config, base), tokenizer_files(wanted.folder, base)
    with tempfile.TemporaryDirectory() as work:
        draft = Path(work, (wanted.out or wanted.folder).resolve().name)
        with _as_lora(wanted):
            write_checkpoint(made, draft, wanted.engine, beside)
        about = described(draft)
        if wanted.dry_run:
            return about
        if script is not None and wanted.gguf is not None:
            convert(script, draft, wanted.gguf, "--base", _base_for(base), "--outtype", "f32")
    if wanted.out is not None:
        with bad_input("OUT"):
            write_checkpoint(made, wanted.out, wanted.engine, beside)
    return about


@contextmanager
def _as_lora(wanted: Wanted) -> Iterator[None]:
    """A ValueError in the block says that no LoRA can be made of the adapter."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{wanted.adapter} cannot be written as a LoRA: {error}") from error


def _checkpoint(wanted: Wanted, config: Any, base: str | None) -> LoraCheckpoint:
    """By the files alone if they suffice, and no base model was given to look at."""
    if wanted.kind == "LORA":
        with bad_input("ADAPTER"):
            return read_checkpoint(wanted.folder)
    from peft_dynamic.cli import _hollow

    with blame(f"{wanted.adapter} cannot be read", AGAIN):
        missing = untold(wanted.folder, config, wanted.written)
        ordered = missing is None and needs_order(wanted.folder)
    if not base and (missing or ordered):
        what = missing or "the order of its modules, which its calibration needs"
        raise typer.BadParameter(
            f"missing. {wanted.adapter} does not say its base model, whose configuration tells {what}.",
            param_hint="--model",
        )
    if missing is None and wanted.model is None:
        order = _hollow.order_of(wanted.folder, config, base) if ordered and base else None
        with blame(f"{wanted.adapter} cannot be written as a LoRA", AGAIN):
            return stock_checkpoint(wanted.folder, wanted.rank, order)
    assert base
    with tempfile.TemporaryDirectory() as work, _as_lora(wanted):
        _hollow.exported(wanted.folder, config, base, wanted.rank, Path(work, "lora"))
        return read_checkpoint(Path(work, "lora"))


def _base_for(base: str | None) -> str:
    """The folder with the base model's configuration, which llama.cpp's converter reads."""
    folder = base_folder(base, ["*.json", "tokenizer*"]) if base else None
    if folder is None or not (folder / "config.json").is_file():
        raise typer.BadParameter(
            f"missing. --gguf reads the configuration of the base model, and {base!r} is not here.",
            param_hint="--model",
        )
    return str(folder)
