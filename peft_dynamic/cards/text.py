"""Foreign text in a card: names of models and columns, prompts, answers. None of it may become markup or metadata."""

from __future__ import annotations

import json
import re

_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~$@])")
# What the next call looks for, to replace what this one wrote
_MARKER = re.compile(r"<!--(\s*peft_dynamic)", re.IGNORECASE)
# What a terminal or a page would obey: control characters, and those that turn the direction of writing
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")


def one_line(value: object, most: int = 300) -> str:
    """A value on one line, without control characters, and not longer than `most`."""
    text = " ".join(_printable(str(value)).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def inline(value: object) -> str:
    """A value as words of a sentence, or in a cell of a table: what it shows is the value itself."""
    text = _MARKUP.sub(r"\\\1", one_line(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("://", ":&#47;&#47;").replace("www.", "www&#46;")  # which would become links


def code(value: object) -> str:
    """A value as a span of code, also in a cell of a table: there an unescaped bar would end the cell."""
    text = one_line(value).replace("|", "\\|")
    ticks = "`" * (1 + _longest_run(text))
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fenced(text: str, language: str = "text") -> str:
    """Text as a block of code, which nothing in it can end."""
    body = _MARKER.sub(r"<! --\1", _printable(text).strip("\n"))
    fence = "`" * max(3, 1 + _longest_run(body))
    return f"{fence}{language}\n{body}\n{fence}"


def literal(value: str) -> str:
    """A text as a literal of Python, on one line."""
    return json.dumps(_printable(value), ensure_ascii=False)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table whose cells are ready for it; the first column is to the left, the others to the right."""
    head = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _printable(text: str) -> str:
    """Without what a terminal or a page would obey, and with nothing that UTF-8 cannot hold."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "replace").decode("utf-8")
    return _OBEYED.sub("", text)
