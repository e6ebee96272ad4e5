"""What a verb tells other programs: one JSON object on stdout with all talk on stderr, and its exit code."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object, and messages to stderr.")]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")]

# docs/command.md has the same table
EXIT_CODES = {
    0: "all was done",
    1: "it failed on the way",
    2: "the arguments are wrong, and nothing was written",
    3: "measure or compare had no time for some rows",
    130: "it was interrupted (128 and the number of the signal)",
}
UNFINISHED = 3


@contextmanager
def answering(as_json: bool) -> Iterator[dict[str, Any]]:
    """Inside, what is printed goes to stderr if JSON is wanted; the dict, which the block fills, is printed at its end.

    After an error there is no object: the message is on stderr, and the exit code tells its kind.
    """
    answer: dict[str, Any] = {}
    if not as_json:
        yield answer
        return
    with redirect_stdout(sys.stderr):
        yield answer
    typer.echo(in_json(answer))


def in_json(answer: Mapping[str, Any]) -> str:
    """An answer as JSON."""
    return json.dumps(_plain(answer), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    """The same with null for what no JSON can hold, as in the files of curves."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float) or value is None else str(value)
