"""Training text: rows become conversations, checked before any model loads.

Notable: the shapes are TRL's (`prompt` and `completion` as text or as messages, `messages`, `text`, and `conversations`
with `from` and `value`, as its `maybe_convert_to_chatml` takes them) and Alpaca's. TRL is not imported: the command has
to work without it, and a row that we do not understand is refused by its number, its key and what to do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import typer

from peft_dynamic.cli._read import read_rows as read_rows

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    # ShareGPT's
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"observation": "tool", "function": "tool", "tool_response": "tool"},
}
# What a chat template is given beside the messages
BESIDE = ("tools", "chat_template_kwargs", "system")


class Columns(NamedTuple):
    """The names of the columns that hold the text."""

    prompt: str = "prompt"
    completion: str = "completion"
    text: str | None = None
    instruction: str | None = None  # put before each prompt


@dataclass(frozen=True)
class Example:
    """A conversation, and which of its turns are learnt. One of a single turn is plain text, all of it learnt."""

    messages: list[dict[str, Any]]
    learns: tuple[int, ...]
    template: dict[str, Any] = field(default_factory=dict)  # what the chat template is given beside the messages
    where: str = "a row"
    skipped: int = 0  # answers that have nothing before them, and so are not learnt

    @property
    def given(self) -> list[dict[str, Any]]:
        """The turns before the last one that is learnt."""
        return self.messages[: self.learns[-1]]

    @property
    def learnt(self) -> str:
        """The text of the last turn that is learnt."""
        return str(self.messages[self.learns[-1]]["content"])


def unused_columns(rows: list[dict[str, Any]], columns: Columns) -> list[str]:
    """The columns that `to_examples` does not look at, for the user to be told."""
    there = list(dict.fromkeys(key for row in rows for key in row))
    return [key for key in there if key not in _columns_used(rows[0], columns)]


def to_examples(rows: list[dict[str, Any]], columns: Columns, source: str, option: str) -> list[Example]:
    """The rows as conversations, by the columns that the first row has.

    Raises:
        typer.BadParameter: a column is missing, or a value is none that can be learnt from.
    """
    if not _columns_used(rows[0], columns):
        wanted = (
            f"column {columns.text!r}"
            if columns.text
            else f"columns {columns.prompt!r} and {columns.completion!r}, or 'messages', or 'text'"
        )
        raise typer.BadParameter(
            f"{source} has no {wanted}; its columns are {', '.join(map(repr, sorted(rows[0])))}. Name yours with "
            "--prompt-column and --completion-column, or --text-column. Also read: 'conversations' (ShareGPT), and "
            "'instruction', 'input' and 'output' (Alpaca).",
            param_hint=option,
        )
    if columns.instruction and _columns_used(rows[0], columns)[0] in (
        "messages",
        "conversations",
        "text",
        columns.text,
    ):
        raise typer.BadParameter(
            f"{source} has conversations or plain text, and no prompts to put it before. Leave it out.",
            param_hint="--instruction",
        )
    return [
        _Reader(row, f"{source}, row {number}", option).example(columns, rows[0])
        for number, row in enumerate(rows, start=1)
    ]


def _columns_used(first: dict[str, Any], columns: Columns) -> tuple[str, ...]:
    """The columns that are read; which they are shows in the first row."""
    if columns.text is not None:
        return (columns.text,) if columns.text in first else ()
    if columns.prompt in first and columns.completion in first:
        context = ("input",) if columns.prompt == "instruction" else ()
        return (columns.prompt, columns.completion, *context, *BESIDE)
    if columns[:2] != Columns()[:2]:  # named by the user: no others will do
        return ()
    for name in ("messages", "conversations"):
        if name in first:
            return (name, *BESIDE)
    if "instruction" in first and "output" in first:
        return ("instruction", "input", "output", "history", *BESIDE)
    return ("text",) if "text" in first else ()


class _Reader:
    """One row, and how its faults are told."""

    def __init__(self, row: dict[str, Any], where: str, option: str) -> None:
        self.row, self.where, self.option = row, where, option

    def refuse(self, problem: str) -> NoReturn:
        raise typer.BadParameter(f"{self.where}: {problem}", param_hint=self.option)

    def example(self, columns: Columns, first: dict[str, Any]) -> Example:
        used = _columns_used(first, columns)
        if len(used) == 1:
            turn = {"role": "assistant", "content": self.text(used[0])}
            return Example([turn], (0,), where=self.where)
        if used[0] in ("messages", "conversations"):
            messages, start = self.messages(used[0], self.row.get(used[0]), 2), 0
        else:
            if used[0] == "instruction":
                columns = columns._replace(prompt="instruction", completion=used[1] if used[1] != "input" else "output")
                if self.row.get("history"):
                    self.refuse("column 'history' is not read: write the conversation as 'messages'.")
            messages = self.prompt(columns)
            start = len(messages)
            messages += self.completion(columns)
        system = self.row.get("system")
        if system:
            if messages[0]["role"] in ("system", "developer"):
                self.refuse("it has a column 'system' and a system turn. Keep one of them.")
            messages.insert(0, {"role": "system", "content": self.text("system")})
            start += 1
        learns = [i for i, turn in enumerate(messages) if i >= start and turn["role"] == "assistant"]
        learns = [i for i in learns if messages[i].pop("weight", 1)]
        if not learns or learns[-1] == 0:
            self.refuse("no assistant turn with something before it, so there is nothing to learn. Drop the row.")
        return Example(messages, tuple(i for i in learns if i > 0), self.beside(), self.where, learns.count(0))

    def text(self, column: str) -> str:
        value = self.row.get(column)
        if not isinstance(value, str) or not value.strip():
            problem = "is missing" if column not in self.row else f"must be text that is not empty, got {value!r}"
            self.refuse(f"column {column!r} {problem}.")
        return self.whole(value, f"column {column!r}")

    def whole(self, text: str, what: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            self.refuse(f"{what} holds half a character ({half}, a lone surrogate), which no file can hold. Mend it.")
        return text

    def prompt(self, columns: Columns) -> list[dict[str, Any]]:
        value = self.row.get(columns.prompt)
        if isinstance(value, list):
            messages = self.messages(columns.prompt, value, 1)
        else:
            text = self.text(columns.prompt)
            context = self.row.get("input") if columns.prompt == "instruction" else None
            if context is not None and context != "":
                text = f"{text}\n\n{self.text('input')}"
            messages = [{"role": "user", "content": text}]
        asked = next((turn for turn in reversed(messages) if turn["role"] == "user"), None)
        if columns.instruction and asked:
            asked["content"] = f"{columns.instruction}\n{asked['content']}"
        return messages

    def completion(self, columns: Columns) -> list[dict[str, Any]]:
        value = self.row.get(columns.completion)
        if isinstance(value, list):
            return self.messages(columns.completion, value, 1)
        return [{"role": "assistant", "content": self.text(columns.completion)}]

    def messages(self, column: str, value: Any, least: int) -> list[dict[str, Any]]:
        if not isinstance(value, list) or len(value) < least or not all(isinstance(turn, dict) for turn in value):
            number = "two objects" if least == 2 else "one object"
            self.refuse(
                f"{column!r} must be a list of at least {number} with 'role' and 'content', the "
                "assistant's turns being what is learnt."
            )
        return [self.turn(turn, f"{column}[{i}]") for i, turn in enumerate(value)]

    def turn(self, given: dict[str, Any], what: str) -> dict[str, Any]:
        turn = {key: value for key, value in given.items() if value is not None}
        role = turn.pop("from", None) if "role" not in turn else turn.pop("role")
        if role not in ROLES:
            fix = " Write it as an assistant's turn with 'tool_calls'." if role == "function_call" else ""
            self.refuse(f"{what} has the role {role!r}; there are {', '.join(ROLES)}.{fix}")
        content = turn.pop("value", None) if "content" not in turn else turn.pop("content")
        message = {"role": ROLES[role], "content": self.content(content, what), **turn}
        if "tool_calls" in message:
            message["tool_calls"] = self.tool_calls(message["tool_calls"], what)
            if not message["tool_calls"]:
                del message["tool_calls"]
        if message.get("weight", 1) not in (0, 1):
            self.refuse(f"{what} has the weight {message['weight']!r}; it must be 0, not learnt, or 1.")
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            self.refuse(f"{what} is an assistant's turn without text, so it would teach to say nothing. Drop it.")
        return message

    def content(self, value: Any, what: str) -> str:
        if value is None:
            return ""
        if isinstance(value, list):  # content parts
            for part in value:
                if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                    kind = part.get("type") if isinstance(part, dict) else part
                    self.refuse(f"{what} has a part that is no text ({kind!r}); only text is trained on. Drop the row.")
            value = "".join(part["text"] for part in value)
        if not isinstance(value, str):
            self.refuse(f"{what} must have text, or a list of text parts, as 'content'; got {value!r:.80}.")
        return self.whole(value, what)

    def tool_calls(self, value: Any, what: str) -> list[dict[str, Any]]:
        """With the arguments as an object, which chat templates write as JSON themselves."""
        calls = self.parsed(value, what, "tool_calls")
        for call in calls:
            function = call.get("function", call)
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                self.refuse(f"{what}: each of 'tool_calls' needs a function with a 'name'; got {call!r:.80}.")
            if isinstance(function.get("arguments"), str):
                try:
                    function["arguments"] = json.loads(function["arguments"])
                except ValueError:
                    self.refuse(f"{what}: the arguments of {function['name']!r} are no JSON; got {function!r:.80}.")
        return calls

    def parsed(self, value: Any, what: str, key: str) -> list[dict[str, Any]]:
        """A list of objects, which may be written as JSON text."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                self.refuse(f"{what}: {key!r} is text but no JSON; got {value[:60]!r}.")
        value = value or []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.refuse(f"{what}: {key!r} must be a list of objects; got {value!r:.80}.")
        self.whole(json.dumps(value, ensure_ascii=False, default=str), f"{what}: {key!r}")
        return json.loads(json.dumps(value, default=str))  # a copy: the rows stay as they were read

    def beside(self) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if tools := self.parsed(self.row.get("tools"), "column 'tools'", "tools"):
            given["tools"] = tools
        settings = self.row.get("chat_template_kwargs") or {}
        if not isinstance(settings, dict):
            self.refuse(f"column 'chat_template_kwargs' must be an object; got {settings!r:.80}.")
        given |= {key: value for key, value in settings.items() if value is not None}
        return given
