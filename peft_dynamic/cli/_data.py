"""Training text: read, checked before any model loads, and turned into tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import typer

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Columns(NamedTuple):
    """The names of the columns that hold the text."""

    prompt: str = "prompt"
    completion: str = "completion"
    text: str | None = None
    instruction: str | None = None  # put before each prompt


class Example(NamedTuple):
    """What is given and what is learnt. An empty `given` means that all of `learnt` is plain text."""

    given: list[dict[str, str]]  # chat messages
    learnt: str


def read_rows(source: str, option: str) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, or of the train split of a Hub dataset.

    Raises:
        typer.BadParameter: it is missing, empty or not made of JSON objects.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = _read_lines(path, option)
    elif path.suffix or path.exists() or not HUB_NAME.fullmatch(source):
        raise typer.BadParameter(
            f"{source!r} is not a file. Pass a file of JSON lines, or a Hub dataset as user/name.", param_hint=option
        )
    else:
        rows = _read_hub(source, option)
    if not rows:
        raise typer.BadParameter(f"{source!r} has no rows; it needs at least one.", param_hint=option)
    return rows


def _read_lines(path: Path, option: str) -> list[dict[str, Any]]:
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise typer.BadParameter(
                        f"{path}, line {number}: each line must be one JSON object, such as "
                        f'{{"prompt": "...", "completion": "..."}}; got {line[:60]!r}.',
                        param_hint=option,
                    )
                rows.append(row)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(
            f"{path}, line {number}: not JSON ({error.msg}). The file must hold one JSON object a line (JSON lines).",
            param_hint=option,
        ) from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path}: not UTF-8 text ({error.reason}).", param_hint=option) from error
    return rows


def _read_hub(name: str, option: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise typer.BadParameter(
            f"{name!r} is no file here, and a Hub dataset needs datasets: pip install 'peft-dynamic[demo]'.",
            param_hint=option,
        ) from error
    try:
        return list(load_dataset(name, split="train"))
    except Exception as error:  # whatever is wrong, the user has to know the name and the reason
        raise typer.BadParameter(
            f"{name!r} is no file here, and as a Hub dataset its train split could not be loaded: {error}",
            param_hint=option,
        ) from error


def to_examples(rows: list[dict[str, Any]], columns: Columns, source: str, option: str) -> list[Example]:
    """The rows as examples; the columns are `messages`, or prompt and completion, or text, whichever the first row has.

    Raises:
        typer.BadParameter: a column is missing, or holds no text.
    """
    there = sorted(rows[0])

    def value(row: dict[str, Any], number: int, column: str) -> str:
        text = row.get(column)
        if not isinstance(text, str) or not text.strip():
            problem = "is missing" if column not in row else f"must be text that is not empty, got {text!r}"
            raise typer.BadParameter(f"{source}, row {number}: column {column!r} {problem}.", param_hint=option)
        return text

    def asked(prompt: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{columns.instruction}\n{prompt}" if columns.instruction else prompt}]

    numbered = list(enumerate(rows, start=1))
    if columns.text is None and {columns.prompt, columns.completion} <= set(there):
        return [Example(asked(value(row, n, columns.prompt)), value(row, n, columns.completion)) for n, row in numbered]
    if columns.text is None and "messages" in there:
        return [_from_messages(row, n, source, option) for n, row in numbered]
    text = columns.text or "text"
    if text in there:
        return [Example([], value(row, n, text)) for n, row in numbered]
    wanted = (
        f"column {text!r}"
        if columns.text
        else (f"columns {columns.prompt!r} and {columns.completion!r}, or 'messages', or 'text'")
    )
    raise typer.BadParameter(
        f"{source} has no {wanted}; its columns are {', '.join(map(repr, there))}. Name yours with --prompt-column and "
        "--completion-column, or --text-column.",
        param_hint=option,
    )


def _from_messages(row: dict[str, Any], number: int, source: str, option: str) -> Example:
    messages: Any = row.get("messages")
    fine = (
        isinstance(messages, list)
        and len(messages) > 1
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
    if not fine or messages[-1]["role"] != "assistant":
        raise typer.BadParameter(
            f"{source}, row {number}: 'messages' must be a list of at least two objects with 'role' and 'content', the "
            "last one of the role 'assistant' (it is what is learnt).",
            param_hint=option,
        )
    return Example([{"role": m["role"], "content": m["content"]} for m in messages[:-1]], messages[-1]["content"])


def prompt_text(example: Example, tokenizer: Any) -> str:
    """What the model is given before the part that is learnt."""
    if not example.given:
        return ""
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(example.given, tokenize=False, add_generation_prompt=True)
    return "\n".join(message["content"] for message in example.given) + "\n"


def encode(examples: Iterable[Example], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """Token ids and labels, -100 over the prompt. An example whose learnt part lies beyond `max_length` is left out."""
    encoded = []
    for example in examples:
        prompt = prompt_text(example, tokenizer)
        chat = bool(example.given) and bool(getattr(tokenizer, "chat_template", None))
        completion = example.learnt
        if chat:  # what the template puts after an answer is learnt too: the model has to know when to stop
            whole = tokenizer.apply_chat_template(
                [*example.given, {"role": "assistant", "content": example.learnt}], tokenize=False
            )
            completion = (
                whole.removeprefix(prompt) if whole.startswith(prompt) else example.learnt + tokenizer.eos_token
            )
        elif tokenizer.eos_token:
            completion += tokenizer.eos_token
        # tokenized apart, as in use: there the prompt ends before the model goes on
        before = tokenizer(prompt, add_special_tokens=not chat)["input_ids"] if prompt else []
        after = tokenizer(completion, add_special_tokens=not prompt)["input_ids"]
        ids, labels = (before + after)[:max_length], ([-100] * len(before) + after)[:max_length]
        if any(label != -100 for label in labels[1:]):
            encoded.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return encoded
