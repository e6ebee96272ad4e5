"""What `peft-dynamic compare` is given: an adapter, one rank or budget of it, or the base model."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import typer

from peft_dynamic.cli._setting import Setting


@dataclass(frozen=True)
class Contender:
    """One of those that are compared.

    Attributes:
        word: as it was given.
        adapter: its folder or name; None for the base model.
        at: the rank or budget; None for the adapter as it is.
    """

    word: str
    adapter: str | None
    at: Setting | None = None


def parsed(word: str) -> Contender:
    """A word of the command line.

    Raises:
        typer.BadParameter: what stands after @ is neither a rank nor a share.
    """
    if word == "base":
        return Contender(word, None)
    adapter, found, suffix = word.rpartition("@")
    if not found or Path(word).expanduser().is_dir():
        return Contender(word, word)
    at = None
    with suppress(ValueError):
        at = Setting(rank=int(suffix)) if suffix.isdecimal() else Setting(budget=float(suffix))
    if not adapter or at is None or not (at.rank or 0 < (at.budget or 0) <= 1):
        raise typer.BadParameter(
            f"{word}: after @ must be a rank of at least 1, as run@4, or a share above 0 and up to 1, as run@0.25.",
            param_hint="ADAPTERS",
        )
    return Contender(word, adapter, at)
