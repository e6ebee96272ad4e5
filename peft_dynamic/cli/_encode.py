"""Conversations become tokens: each turn that is learnt, under the text that the model will see before it in use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft_dynamic.cli._data import Example
from peft_dynamic.cli._edge import UserError, reason

Tokens = dict[str, list[int]]


@dataclass
class Encoded:
    """Token ids and labels, and what became of the turns.

    Attributes:
        rows: one dict per row of training: input_ids, attention_mask, labels.
        without: examples of which nothing is left within the length.
        turns: turns that were to be learnt.
        lost: of these, the turns of which nothing is within the length.
        cut: of these, the turns of which a part is not.
        apart: turns with a row of their own, since the chat template writes them otherwise once later turns follow.
    """

    rows: list[Tokens]
    without: int = 0
    turns: int = 0
    lost: int = 0
    cut: int = 0
    apart: int = 0


@dataclass
class Piece:
    """Text that becomes tokens by itself, as in use: there the prompt ends before the model goes on."""

    text: str
    learnt: bool


class Template:
    """A tokenizer's chat template, over one example."""

    def __init__(self, example: Example, tokenizer: Any) -> None:
        self.example, self.tokenizer = example, tokenizer

    def __call__(self, messages: list[dict[str, Any]], start: bool = False, **changes: Any) -> str:
        """The messages as text; `start` adds what comes before an answer."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=start, **(self.example.template | changes)
            )
        except Exception as error:  # a template raises what it likes
            raise UserError(
                f"{self.example.where}: the model's chat template refuses it ({reason(error)}). Mend or drop the row."
            ) from error

    def check(self) -> None:
        """Raise unless the text shows every turn, every call of a tool and the tools."""
        messages = self.example.messages[: self.example.learns[-1] + 1]
        whole = self(messages)
        what = ""
        if self.example.template.get("tools") and self(messages, tools=None) == whole:
            what = "the column 'tools'"
        for i, message in enumerate(messages):
            rest = messages[:i] + messages[i + 1 :]
            if message.get("tool_calls"):
                bare = {key: value for key, value in message.items() if key != "tool_calls"}
                if self([*messages[:i], bare, *messages[i + 1 :]]) == whole:
                    what = f"the 'tool_calls' of turn {i}"
            elif message["content"].strip() not in whole and self._same_without(rest, whole):
                what = f"turn {i}, of the role {message['role']!r}"
        if what:
            raise UserError(
                f"{self.example.where}: the model's chat template leaves out {what}. Drop it from the data, or pass a "
                "--model whose template writes it."
            )

    def _same_without(self, rest: list[dict[str, Any]], whole: str) -> bool:
        try:
            return self(rest) == whole
        except UserError:  # some templates refuse what is left; then the turn made a difference
            return False


def is_chat(example: Example, tokenizer: Any) -> bool:
    """Whether the example goes through the chat template."""
    return bool(example.given) and bool(getattr(tokenizer, "chat_template", None))


def prompt_text(example: Example, tokenizer: Any) -> str:
    """What the model is given before the last turn that is learnt."""
    if not example.given:
        return ""
    if is_chat(example, tokenizer):
        return Template(example, tokenizer)(example.given, start=True)
    return "\n".join(message["content"] for message in example.given) + "\n"


def encode(examples: Iterable[Example], tokenizer: Any, max_length: int) -> list[Tokens]:
    """Token ids and labels, -100 over what is not learnt. What lies beyond `max_length` is left out."""
    return encode_all(examples, tokenizer, max_length).rows


def encode_all(examples: Iterable[Example], tokenizer: Any, max_length: int) -> Encoded:
    """As `encode`, with the counts of what is left out.

    Raises:
        UserError: the chat template refuses a row, or leaves out a part of it.
    """
    result = Encoded([])
    for example in examples:
        many = _pieces(example, tokenizer)
        chat = is_chat(example, tokenizer)
        result.turns += len(example.learns)
        result.apart += len(many) - 1
        rows = [row for pieces in many if (row := _tokens(pieces, tokenizer, max_length, chat, result))]
        result.without += not rows
        result.rows += rows
    return result


def encode_and_tell(
    examples: Sequence[Example], tokenizer: Any, max_length: int, option: str
) -> tuple[list[Tokens], list[str]]:
    """As `encode`, with a sentence about each thing that is left out.

    Args:
        examples: the conversations.
        tokenizer: the model's.
        max_length: in tokens.
        option: the one that named the rows.

    Raises:
        UserError: as in `encode_all`, or nothing to learn is left.
    """
    encoded = encode_all(examples, tokenizer, max_length)
    if not encoded.rows:
        raise UserError(
            f"{option}: of {len(examples)} examples none has a part to learn within --max-length {max_length} "
            "tokens. Raise it, or shorten the prompts."
        )
    notes = []
    if skipped := sum(example.skipped for example in examples):
        notes.append(f"{skipped} answers are not learnt, since nothing stands before them.")
    if encoded.without:
        notes.append(
            f"{encoded.without} of {len(examples)} examples left out: what is learnt lies beyond "
            f"--max-length {max_length}."
        )
    if encoded.lost:
        notes.append(f"{encoded.lost} of {encoded.turns} answers left out, which lie beyond --max-length.")
    if encoded.cut:
        notes.append(f"{encoded.cut} of {encoded.turns} answers end at --max-length.")
    if encoded.apart:
        notes.append(
            f"{encoded.apart} of {encoded.turns} answers have rows of their own, since the chat template "
            "writes an answer otherwise once others follow."
        )
    return encoded.rows, [f"{option}: {note}" for note in notes]


def _pieces(example: Example, tokenizer: Any) -> list[list[Piece]]:
    """The rows that an example becomes: one, and one for each turn that cannot be learnt in it."""
    end = tokenizer.eos_token or ""
    if not example.given:
        return [[Piece(example.learnt + end, True)]]
    if is_chat(example, tokenizer):
        return _chat_pieces(example, tokenizer, end)
    if example.template.get("tools") or any("tool_calls" in message for message in example.messages):
        raise UserError(f"{example.where}: it has tools, and the model has no chat template to write them.")
    texts = [message["content"] for message in example.messages]
    return [[Piece("\n".join(texts[:i]) + "\n", False), Piece(texts[i] + end, True)] for i in example.learns]


def _chat_pieces(example: Example, tokenizer: Any, end: str) -> list[list[Piece]]:
    template = Template(example, tokenizer)
    template.check()
    last = example.learns[-1]
    whole = template(example.messages[: last + 1])
    together: list[Piece] = []
    apart: list[list[Piece]] = []
    done = 0
    for i in example.learns:
        before = template(example.messages[:i], start=True)
        after = template(example.messages[: i + 1])
        # what the template puts after an answer is learnt too: the model has to know when to stop
        if whole.startswith(after) and after.startswith(before) and len(before) >= done:
            together += [Piece(whole[done : len(before)], False), Piece(whole[len(before) : len(after)], True)]
            done = len(after)
        elif after.startswith(before):
            apart.append([Piece(before, False), Piece(after[len(before) :], True)])
        elif "tool_calls" in example.messages[i]:
            raise UserError(
                f"{example.where}, turn {i}: the chat template begins an answer with other text than it writes before "
                "this one, so where its 'tool_calls' begin is not known. Drop the row."
            )
        else:
            apart.append([Piece(before, False), Piece(example.messages[i]["content"] + end, True)])
    return [row for row in (together, *apart) if row]


def _tokens(pieces: list[Piece], tokenizer: Any, max_length: int, chat: bool, result: Encoded) -> Tokens | None:
    ids: list[int] = []
    labels: list[int] = []
    for number, piece in enumerate(pieces):
        special = not chat and number == 0  # a template writes its own
        new = tokenizer(piece.text, add_special_tokens=special)["input_ids"] if piece.text else []
        if piece.learnt:
            # the first token of a row is predicted from nothing
            inside = max(0, min(len(new), max_length - len(ids)) - (not ids))
            result.lost += inside == 0
            result.cut += 0 < inside < len(new) - (not ids)
        ids += new
        labels += new if piece.learnt else [-100] * len(new)
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == -100 for label in labels[1:]):
        return None
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
