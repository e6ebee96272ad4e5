"""Rows of a classifier: one text or two, and a label, checked before any model loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer


@dataclass(frozen=True)
class Labelled:
    """A row of a classifier."""

    texts: tuple[str, ...]
    label: str | int | float
    where: str = "a row"


def to_labelled(
    rows: list[dict[str, Any]], text: str | None, label: str, source: str, option: str
) -> tuple[list[Labelled], list[str]]:
    """The rows with their texts and labels, and the columns that hold the texts.

    Args:
        rows: as they were read.
        text: the columns of the texts, with a comma between two; None for all that hold text in the first row.
        label: the column of the label.
        source: what the rows are called in messages.
        option: the option that named them.

    Raises:
        typer.BadParameter: a column is missing, or a value is none.
    """
    columns = _text_columns(rows[0], text, label, source, option)
    examples = []
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        for column in columns:
            if not isinstance(row.get(column), str):
                raise typer.BadParameter(
                    f"{where}: column {column!r} must be text, got {row.get(column)!r:.80}.", param_hint=option
                )
        value = row.get(label)
        if not isinstance(value, str | int | float) or value == "":
            raise typer.BadParameter(
                f"{where}: column {label!r} must be a label's number or name, got {value!r:.80}. Drop the row.",
                param_hint=option,
            )
        examples.append(Labelled(tuple(row[column] for column in columns), value, where))
    return examples, columns


def _text_columns(first: dict[str, Any], text: str | None, label: str, source: str, option: str) -> list[str]:
    there = ", ".join(map(repr, first))
    if label not in first:
        raise typer.BadParameter(
            f"{source} has no column {label!r}, which a classifier needs; its columns are {there}. Name yours "
            "with --label-column.",
            param_hint=option,
        )
    columns = [name for name, value in first.items() if name != label and isinstance(value, str)]
    if text is not None:
        columns = [name.strip() for name in text.split(",")]
        if missing := [name for name in columns if name not in first]:
            raise typer.BadParameter(
                f"{source} has no column {missing[0]!r}; its columns are {there}.", param_hint="--text-column"
            )
    if len(columns) not in (1, 2):
        raise typer.BadParameter(
            f"{source}: a classifier takes one text or two, and the columns of text are "
            f"{', '.join(map(repr, columns)) or 'none'}. Name yours with --text-column.",
            param_hint=option,
        )
    return columns


def numbered(examples: list[Labelled], names: dict[str, int], count: int, option: str) -> list[int | float]:
    """The labels as the model's numbers; of a model with one output as they are.

    Args:
        examples: the rows.
        names: label -> number, as the model's configuration has it.
        count: how many outputs the model has.
        option: the option that named the rows.

    Raises:
        typer.BadParameter: a label is none of the model's.
    """
    found: list[int | float] = []
    for example in examples:
        value: Any = names.get(str(example.label), example.label)
        try:
            number = float(value)
        except ValueError:
            number = -1.0 if count > 1 else float("nan")
        if count == 1 and number == number:
            found.append(number)
        elif count > 1 and number.is_integer() and 0 <= number < count:
            found.append(int(number))
        else:
            rule = f"a whole number from 0 to {count - 1}" if count > 1 else "a number"
            known = f", or one of {', '.join(map(repr, names))}" if count > 1 and names else ""
            raise typer.BadParameter(
                f"{example.where}: the label {example.label!r} must be {rule}{known}: the adapter has {count} "
                f"output{'s' * (count > 1)}.",
                param_hint=option,
            )
    return found
