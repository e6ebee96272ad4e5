"""What the examples check before a model is loaded: a wrong option ends in a line that says what to do."""

import argparse
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from yaml import YAMLError


def read_rows(parser: argparse.ArgumentParser, option: str, name: str | Path, *forms: tuple[str, ...]) -> list[Any]:
    """The rows of a file of JSON lines, which may end in .gz; each has the columns of one of `forms`."""
    path, what = Path(name).expanduser(), f"{option} {name}"
    columns = " or ".join(", ".join(form) for form in forms)
    fix = f"Name a file of JSON lines with {columns}."
    if not path.is_file():
        parser.error(f"{what}: {'it is a folder' if path.is_dir() else 'there is no such file'}. {fix}")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        parser.error(f"{what}: it cannot be read ({error}). {fix}")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            parser.error(f"{what}, line {number}: it is not JSON ({error}). {fix}")
        if not isinstance(row, dict) or not any(set(form) <= set(row) for form in forms):
            found = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
            parser.error(f"{what}, line {number}: a row needs {columns}, and this one has {found}. Mend or drop it.")
        rows.append(row)
    if not rows:
        parser.error(f"{what}: it has no rows. {fix}")
    return rows


def check_model(parser: argparse.ArgumentParser, option: str, name: str | None) -> None:
    """Refuse a path at which no model is."""
    path = Path(name or "").expanduser()
    if not name:
        parser.error(f"{option}: it is missing. Name a model, a folder or one of the Hub.")
    if path.is_dir() and not (path / "config.json").is_file():
        parser.error(f"{option} {name}: it is a folder without a config.json, so no model. Name a model's folder.")
    if not path.is_dir() and (path.exists() or name.startswith((".", "/", "~"))):
        parser.error(f"{option} {name}: there is no such folder. Name a model's folder, or a model of the Hub.")


def check(parser: argparse.ArgumentParser, fine: bool, option: str, value: object, rule: str) -> None:
    """Refuse a value."""
    if not fine:
        parser.error(f"{option} {value}: it must be {rule}.")


def check_distillation(parser: argparse.ArgumentParser, **fields: Any) -> None:
    """Refuse fields of a distillation that have no meaning."""
    from peft_dynamic.trainers import DistillFields

    try:
        DistillFields(**fields).check_distillation()
    except (ValueError, TypeError) as error:
        parser.error(f"--{error}")


def whole(least: int) -> Callable[[str], int]:
    """For argparse: a whole number that is not below `least`."""

    def read(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: it must be a whole number of at least {least}.")
        return int(text)

    return read


def above_zero(text: str) -> float:
    """For argparse: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: it must be a number above 0.")
    return number


def read_settings(parser: Any) -> Any:
    """What TRL's parser makes of the command line and of --config; a wrong setting is a line here too."""
    if not torch.accelerator.is_available():
        parser.set_defaults(bf16=False)  # TRL's own default, which transformers refuses here
    try:
        return parser.parse_args_and_config()
    except (ValueError, TypeError, OSError, YAMLError) as error:
        parser.error(" ".join(str(error).split()))
