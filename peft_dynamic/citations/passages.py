"""The one reader of rows and passages, for training and for evaluation: what cites a passage is the same in both."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any


def as_records(rows: Any) -> Iterable[Any]:
    """The rows as mappings: those of a pandas DataFrame too, over whose columns Python would iterate."""
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        return rows.to_dict("records")
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise TypeError(f"rows is a {type(rows).__name__}: pass a list of mappings, a datasets.Dataset or a DataFrame.")
    return rows


def is_missing(value: Any) -> bool:
    """Whether a field is empty: None, or the NaN that pandas puts there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_list(value: Any) -> Any:
    """A list where numpy has an array, as rows from Parquet do; all else as it is."""
    return value.tolist() if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1 else value


def read_index(value: Any, place: str) -> int:
    """The number that cites a passage: a whole number from 1, as an int, numpy's integer, 2.0 or "2".

    Raises:
        ValueError: it is none; `place` is named.
    """
    if isinstance(value, str):
        whole = re.fullmatch(r"\s*[0-9]+\s*", value) is not None
    else:
        whole = isinstance(value, Integral) or (isinstance(value, Real) and float(value).is_integer())
    number = int(value) if whole and not isinstance(value, bool) else 0
    if number < 1:
        raise ValueError(
            f"{place}: `index` must be a whole number from 1, as it is cited, and is {value!r}; the rule is numbers "
            "from 1 that differ. Leave `index` out where the answer counts the passages by their order."
        )
    return number


def read_indices(passages: Iterable[Any], where: str) -> list[int]:
    """What cites each passage: its `index`, or where none has one its place, from 1.

    Args:
        passages: texts, or mappings with or without an `index`.
        where: what they belong to, for the error.

    Raises:
        ValueError: an `index` is no number from 1, comes twice, or only some passages have one.
    """
    listed = list(passages)
    given = [None if not isinstance(p, Mapping) or is_missing(p.get("index")) else p["index"] for p in listed]
    if all(index is None for index in given):
        return [*range(1, len(listed) + 1)]
    if None in given:
        raise ValueError(
            f"{where}: only some passages have an `index`, the first without is {given.index(None)}. Give it to all "
            "or to none."
        )
    indices = [read_index(index, f"{where}: passages[{k}]") for k, index in enumerate(given)]
    if len({*indices}) < len(indices):
        raise ValueError(
            f"{where}: the passages' `index` must be different, numbers from 1 that differ, and they are {indices}."
        )
    return indices


def passage_texts(passage: Any) -> tuple[Any, Any]:
    """(title, text) of a passage: a text, or a mapping with `text` and perhaps `title`; unchecked, None where missing.

    ALCE's rows may have an extract in `sent` beside the whole passage, which its script takes before the whole.
    """
    if isinstance(passage, str):
        passage = {"text": passage}
    if not isinstance(passage, Mapping):
        return None, None
    return None if is_missing(passage.get("title")) else passage["title"], passage.get("sent", passage.get("text"))


def half_character(text: str) -> bool:
    """Whether the text holds a lone surrogate, which no file and no tokenizer can take."""
    return any("\ud800" <= character <= "\udfff" for character in text)
