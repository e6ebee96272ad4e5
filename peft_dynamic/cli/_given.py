"""What several verbs are given, checked without any library: adapters, base models, numbers, files to write."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path, PurePath
from typing import Annotated

import typer

from peft_dynamic.cli._edge import require_package
from peft_dynamic.cli._read import HUB_NAME

ADAPTER = Annotated[str, typer.Argument(help="A folder with a saved adapter, or a name on the Hub (user/name).")]
OUT = Annotated[Path, typer.Argument(help="The folder to write.")]
# The options of the verbs that run an adapter on its base model over rows
MODEL = Annotated[str | None, typer.Option(help="The base model, if it is not where the adapter says.")]
PROMPT = Annotated[str, typer.Option(help="Column of what is given.")]
COMPLETION = Annotated[str, typer.Option(help="Column of what is learnt.")]
TEXT = Annotated[str | None, typer.Option(help="Column of plain text. Of a classifier also two: a,b.")]
LABEL = Annotated[str, typer.Option(help="Column of a classifier's labels.")]
INSTRUCTION = Annotated[str | None, typer.Option(help="A line to put before each prompt.")]
MAX_LENGTH = Annotated[int, typer.Option(help="Longer rows are cut to this many tokens.")]
BATCH_SIZE = Annotated[int, typer.Option(help="Rows in a batch.")]
FOUR_BIT = Annotated[bool, typer.Option("--4bit", help="Quantise the base model to 4 bits; of QDyLoRA it always is.")]

PICTURES = (".png", ".svg", ".pdf")  # what reports.curve writes


class Engine(StrEnum):
    """Who reads the file."""

    peft = "peft"
    vllm = "vllm"
    llama_cpp = "llama.cpp"


def require(fine: bool, option: str, value: object, rule: str) -> None:
    """Stop unless a value is fine.

    Raises:
        typer.BadParameter: it is not; the message has the value and the rule.
    """
    if not fine:
        raise typer.BadParameter(f"{value}: must be {rule}.", param_hint=option)


def count_or_share(parameters: float, option: str = "--parameters") -> int | float:
    """A budget of numbers: a count as an int, a share as a float."""
    rule = "a share above 0 and up to 1, or a whole number"
    whole = parameters > 1 and float(parameters).is_integer()
    require(0 < parameters <= 1 or whole, option, parameters, rule)
    return int(parameters) if whole else float(parameters)


def ranks_of(text: str, what: str) -> list[int | None]:
    """Ranks with commas between them; None for 0, the base model.

    Raises:
        typer.BadParameter: they are none, or one comes twice.
    """
    try:
        listed = [int(word) for word in text.split(",")]
    except ValueError:
        listed = [-1]
    rule = "ranks with commas between, each once, such as 2,8,32; 0 is the base model"
    require(min(listed) >= 0 and len(listed) == len(set(listed)), what, repr(text), rule)
    return [each or None for each in listed]


def check_adapter(adapter: str, option: str = "ADAPTER") -> None:
    """Stop unless this is the folder of an adapter, or may be the name of one on the Hub."""
    folder = Path(adapter).expanduser()
    if adapter and folder.is_dir():
        if not (folder / "adapter_config.json").is_file():
            raise typer.BadParameter(
                f"{adapter} has no adapter_config.json. Pass a folder that save_pretrained wrote.",
                param_hint=option,
            )
    elif folder.exists() or not HUB_NAME.fullmatch(adapter):
        raise typer.BadParameter(
            f"{adapter or repr(adapter)} is no folder and no name on the Hub. Pass the folder of a saved adapter, or "
            "user/name.",
            param_hint=option,
        )


def check_model(model: str, option: str = "--model") -> str:
    """The base model as `from_pretrained` takes it.

    Raises:
        typer.BadParameter: it is a path, and no model is there.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise typer.BadParameter(f"{model} is a folder without a config.json, so no model.", param_hint=option)
        return str(path)
    if path.exists() or model.startswith((".", "/", "~")):
        raise typer.BadParameter(f"{model} is not a folder with a model in it.", param_hint=option)
    return model


def check_file(path: Path, option: str) -> None:
    """Stop unless a file can be written there."""
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; pass the name of a file.", param_hint=option)
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir():
        raise typer.BadParameter(f"{path}: {there} is a file, so there can be nothing in it.", param_hint=option)
    if not os.access(there, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{path}: nothing can be written in {there}.", param_hint=option)


def check_picture(path: Path, option: str = "--plot") -> None:
    """Stop unless a picture can be written there."""
    require(path.suffix.lower() in PICTURES, option, path, f"a file that ends in {', '.join(PICTURES)}")
    check_file(path, option)
    require_package("matplotlib", option, "plot")


def command_line(*left_out: str) -> str:
    """The command as it was given, less some words."""
    program = sys.argv[0] if PurePath(sys.argv[0]).suffix != ".py" else f"{sys.executable} -m peft_dynamic.cli"
    return f"{program} {shlex.join(word for word in sys.argv[1:] if word not in left_out)}"


@contextmanager
def bad_input(option: str | None = None) -> Iterator[None]:
    """What the package's functions say of a user's input, as the command says it.

    Raises:
        typer.BadParameter: in place of their errors.
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise typer.BadParameter(" ".join(str(error).split()), param_hint=option) from error
