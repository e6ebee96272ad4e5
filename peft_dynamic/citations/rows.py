"""The rows of `evaluate_citations`: what they may look like, in one form, or what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_dynamic.citations import metrics
from peft_dynamic.citations.passages import as_list, as_records, half_character, passage_texts, read_indices


@dataclass
class Passage:
    """A passage as the judge reads it: its title on a line of its own, if it has one. `index` is what cites it."""

    index: int
    text: str
    title: str | None = None

    def __str__(self) -> str:
        return self.text if self.title is None else f"Title: {self.title}\n{self.text}"


@dataclass
class Row:
    """An answer to evaluate, and what it is compared with."""

    question: str
    output: str
    passages: list[Passage]
    reference: list[str] | None  # long answers, for ROUGE
    human: str | None  # the long answer for MAUVE
    short: list[list[str]] | None  # short answers: of each sub-question, or of each item of a list
    claims: list[str] | None
    goes_on: bool = False  # behind its first line, which is all that is evaluated


def read_rows(rows: Iterable[Mapping[str, Any]], task: str) -> list[Row]:
    """The rows in one form.

    Raises:
        ValueError: there are none, one is not of the form, or only some have a field.
    """
    read = [_read(row, i, task) for i, row in enumerate(as_records(rows))]
    _check_together(read)
    return read


def _read(row: Mapping[str, Any], i: int, task: str) -> Row:
    """A row in one form, or a ValueError that says what of it is wrong."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f"rows[{i}] is a {type(row).__name__}; it must be a mapping with question, output and passages"
        )
    for name in ("question", "output"):
        if not isinstance(row.get(name), str):
            found = f"a {type(row[name]).__name__}" if name in row else f"missing; the row has {', '.join(row)}"
            raise ValueError(f"rows[{i}]: `{name}` must be a text, and is {found}")
        if half_character(row[name]):
            raise ValueError(
                f"rows[{i}]: `{name}` holds half a character (a lone surrogate), which no judge can read. Drop the "
                "row, or mend the text: text.encode(errors='replace').decode()"
            )
    given = as_list(row.get("passages", row.get("docs")))
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise ValueError(f"rows[{i}]: `passages` (or `docs`) must be a list, and is {type(given).__name__}")
    passages = _passages(given, i)
    output = metrics.evaluated_part(row["output"])
    human, references = (None, None) if task == "qampari" else _long_answers(row, i)
    goes_on = len(row["output"].strip().split("\n")) > 1
    return Row(
        row["question"], output, passages, references, human, _short_answers(row, i, task), _claims(row, i), goes_on
    )


def _passages(given: Sequence[Any], i: int) -> list[Passage]:
    indices = read_indices(given, f"rows[{i}]")
    return [_passage(passage, f"rows[{i}]: passages[{k}]", indices[k]) for k, passage in enumerate(given)]


def _passage(given: Any, place: str, index: int) -> Passage:
    title, text = passage_texts(given)
    if not isinstance(text, str) or half_character(text):
        raise ValueError(f"{place} must be a text or a mapping with a `text`, and is {str(given)[:80]!r}")
    if title is not None and not isinstance(title, str):
        raise ValueError(f"{place}: `title` must be a text, and is {title!r}")
    return Passage(index, text, title)


def _long_answers(row: Mapping[str, Any], i: int) -> tuple[str | None, list[str] | None]:
    """That for MAUVE and those for ROUGE, without citations: ALCE takes its `annotations` for ROUGE where there are."""
    answer = row.get("answer")
    long = [a.get("long_answer") for a in row.get("annotations") or []] or ([] if answer is None else [answer])
    if not all(isinstance(text, str) for text in [*long, *([] if answer is None else [answer])]):
        raise ValueError(f"rows[{i}]: `answer`, and `long_answer` of each of `annotations`, must be a text")
    if not long:
        return None, None
    long = [metrics.without_citations(text) for text in long]
    return (long[0] if answer is None else metrics.without_citations(answer)), long


def _short_answers(row: Mapping[str, Any], i: int, task: str) -> list[list[str]] | None:
    if row.get("qa_pairs") is not None:
        found = [pair.get("short_answers") for pair in row["qa_pairs"]]
        name = "qa_pairs"
    elif row.get("answers") is not None:
        found, name = list(row["answers"]) if not isinstance(row["answers"], str) else [], "answers"
        if found and all(isinstance(answer, str) for answer in found):
            found = [[answer] for answer in found] if task == "qampari" else [found]
    else:
        return None
    proper = found and all(
        isinstance(either, Sequence)
        and not isinstance(either, str)
        and either
        and all(isinstance(a, str) for a in either)
        for either in found
    )
    if not proper:
        raise ValueError(
            f"rows[{i}]: `{name}` must have at least one short answer for each sub-question, as texts, and is "
            f"{str(row[name])[:80]}"
        )
    return [list(either) for either in found]


def _claims(row: Mapping[str, Any], i: int) -> list[str] | None:
    claims = row.get("claims")
    if claims is None:
        return None
    if isinstance(claims, str) or not claims or not all(isinstance(claim, str) for claim in claims):
        raise ValueError(f"rows[{i}]: `claims` must be a list of at least one text, and is {str(claims)[:80]}")
    return list(claims)


def _check_together(rows: list[Row]) -> None:
    if not rows:
        raise ValueError("rows is empty; give at least one answer")
    for name, public in (("short", "qa_pairs or answers"), ("claims", "claims"), ("reference", "answer")):
        lacking = [i for i, row in enumerate(rows) if getattr(row, name) is None]
        if 0 < len(lacking) < len(rows):
            raise ValueError(
                f"{len(lacking)} of {len(rows)} rows lack `{public}`, the first of them rows[{lacking[0]}]: the mean "
                "would be over the others alone. Give it in all rows or in none"
            )
