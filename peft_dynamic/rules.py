"""What the settings of a dataclass may hold, in one line each: a field, what it must be, and whether it is.

And where a result may be written. Nothing here waits for torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any


def is_int(value: Any) -> bool:
    """Whether it is an integer, of numpy too, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number, of numpy too, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is a finite number, of numpy too, and no bool."""
    try:
        return is_number(value) and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


Rule = tuple[str, Callable[[Any], bool]]  # what it must be, whether it is


def or_none(text: str, holds: Callable[[Any], bool]) -> Rule:
    """The same rule, which None keeps too."""
    return f"{text} or None", lambda value: value is None or holds(value)


FLAG: Rule = ("True or False", lambda value: isinstance(value, bool))
TEXT = or_none("a text", lambda value: isinstance(value, str))


def is_expression(value: Any) -> bool:
    """Whether it is a text that `re` takes as a regular expression."""
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def check_patterns(name: str, patterns: Iterable[Any]) -> None:
    """Raise ValueError where a dict's keys are no names of modules and no regular expressions."""
    for pattern in patterns:
        if not is_expression(pattern):
            raise ValueError(
                f"{name}: the key {pattern!r} must be the end of a module's name or a regular expression, as in "
                "rank_pattern."
            )


def default_of(field: Field) -> Any:
    """The default of a dataclass's field."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def check_rules(config: Any, rules: Mapping[str, Rule]) -> None:
    """Check the fields that have a rule; numpy's numbers become Python's.

    Raises:
        TypeError, ValueError: one holds what has no meaning; the message has its name, value, rule and default.
    """
    defaults = {field.name: default_of(field) for field in fields(config)}
    for name, (rule, holds) in rules.items():
        value = getattr(config, name)
        if not holds_for(holds, value):
            kind = ValueError if is_number(value) and is_number(defaults[name]) else TypeError
            raise kind(
                f"{type(config).__name__}: {name} must be {rule}, got {value!r} of type {type(value).__name__}. "
                f"The default is {defaults[name]!r}."
            )
        setattr(config, name, plain(value))


def holds_for(check: Callable[[Any], bool], value: Any) -> bool:
    """Whether a rule holds for a value; where it cannot be asked it does not."""
    try:
        return bool(check(value))
    except (TypeError, ValueError):  # an array, say, has no one truth value
        return False


def plain(value: Any) -> Any:
    """The value with Python's numbers in place of numpy's, which no JSON can hold."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return value if isinstance(value, float) and type(value) is float else float(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(map(plain, value))
    return value


def taken_from(cls: type, args: Any) -> Any:
    """A configuration of `cls` out of other training arguments, as TRL's trainers make their own of them."""
    # to_dict() hides all that is called a token, such as SFTConfig's eos_token
    return cls(**{each.name: getattr(args, each.name) for each in fields(args) if each.init})


def check_target(save_directory: str | Path, name: str = "save_directory") -> Path:
    """The folder to write, with "..", "." and links followed, if an export may go there.

    Args:
        save_directory: the folder.
        name: what messages call it.

    Raises:
        FileExistsError: it is a file, holds an adapter that is more than a stock LoRA, or has a README.md and no
            adapter.
        NotADirectoryError: a folder above it is a file.
        PermissionError: nothing can be written there.
        ValueError: it is an empty text.
    """
    check_path(name, save_directory)
    named = f"{name}={str(save_directory)!r}"
    if not os.fspath(save_directory):
        raise ValueError(f"{named}: must be a folder. For the current one pass '.'.")
    target = Path(os.path.realpath(save_directory))  # ".." has no name to put files under, and a link is no place
    if target.is_symlink():
        raise FileExistsError(f"{named} is a link to itself; pass a folder.")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{named} is a file; pass a folder.")
    there = next(folder for folder in (target, *target.parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{named}: {there} is a file, so there can be no folder in it.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{named}: nothing can be written in {there}. Pass another folder, or change its rights.")
    try:
        kind = json.loads((target / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    except FileNotFoundError as error:
        if (target / "README.md").exists():
            raise FileExistsError(
                f"{named} has a README.md and no adapter: it would be replaced. Pass another folder, or move it."
            ) from error
        return target
    except (ValueError, AttributeError, RecursionError):
        return target  # an adapter that could not be loaded
    except IsADirectoryError as error:
        raise FileExistsError(f"{named} has a folder named adapter_config.json; pass another folder.") from error
    if kind != "LORA":
        raise FileExistsError(
            f"{named} holds a {kind} adapter; an export over it would lose what a LoRA lacks. "
            "Pass another folder, or delete that one first."
        )
    return target


def check_path(name: str, value: Any) -> None:
    """Raise TypeError for what is no path."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}={value!r}: must be a path, as a text or a Path.")


def check_apart(adapters: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
    """Raise FileExistsError where the result would replace one of the adapters that it is made of."""
    check_path("out", out)
    for adapter in adapters:
        check_path("adapter", adapter)
        folder = Path(adapter).expanduser()
        if folder.is_dir() and os.path.realpath(folder) == os.path.realpath(out):
            raise FileExistsError(
                f"out={os.fspath(out)!r} is an adapter that is read, and would lose what the result lacks. Pass "
                "another folder."
            )
