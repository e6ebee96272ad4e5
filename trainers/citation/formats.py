"""Prompts for decoder-only models, and how they are made to fit: the passages are cut, never the question or answer.

Notable: a row is laid out around its passages, so that what a prompt costs without them is known. What is left of
`max_length` is shared out among them: short ones stay whole, long ones are cut to the same number of tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_dynamic.citations.passages import as_list, read_indices
from peft_dynamic.trainers.citation.data import read_passages

Passage = Mapping[str, str]


def _alce_passage(i: int, passage: Passage) -> str:
    title = f"(Title: {passage['title']})" if passage["title"] else ""
    return f"Document [{i}]{title}: {passage['text']}"


def _citer_passage(i: int, passage: Passage) -> str:
    return f"[{i}] " + (f"{passage['title']}: " if passage["title"] else "") + passage["text"]


@dataclass(frozen=True)
class CitationFormat:
    """How a question and its passages become a prompt.

    Attributes:
        name: what it is chosen by.
        instruction: the first paragraph of the prompt.
        question: a pattern with {question} and {passages}, which follows it.
        passage: from the id and the passage to its line.
        answer: what stands before the answer; left out in a chat, where the assistant's turn says as much.
    """

    name: str
    instruction: str
    question: str
    passage: Callable[[int, Passage], str]
    answer: str = "Answer:"

    def prompt(self, question: str, passages: Sequence[Passage], chat: bool = False) -> str:
        """The prompt up to where the answer begins; the answer follows after a space, or as the assistant's turn."""
        lines = "\n".join(self.passage(i, passage) for i, passage in enumerate(passages, 1))
        text = f"{self.instruction}\n\n" + self.question.format(question=question, passages=lines)
        return text if chat else f"{text}\n\n{self.answer}"


FORMATS = {
    # ALCE's layout. The instruction says what theirs asks for, in our words.
    "alce": CitationFormat(
        "alce",
        "Instruction: Answer the question precisely and briefly, with the search results below as your only source; "
        "some of them may be beside the point. Every statement needs a citation such as [1], or [1][2] where it takes "
        "more than one document, and each sentence has at least one and no more than three of them.",
        "Question: {question}\n\n{passages}",
        _alce_passage,
    ),
    # That of LLaMACiter: an instruction, then Query and Context.
    "citer": CitationFormat(
        "citer",
        "Reply to the query from those contexts that help, and put the numbers of the contexts that a part of the "
        "answer comes from in brackets behind it, in the IEEE style.",
        "Query: {question}\nContext:\n{passages}",
        _citer_passage,
    ),
}


def find_format(format: str | CitationFormat) -> CitationFormat:
    """A format by its name, or a format of the user's own as it is.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(format, CitationFormat):
        return format
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: choose one of {sorted(FORMATS)}, or pass a CitationFormat of your own.")
    return FORMATS[format]


def fid_input(i: int, question: str, passage: Passage) -> str:
    """What the encoder of a Fusion-in-Decoder model reads for one passage.

    Its number is part of the text: the decoder sees all passages side by side and could not tell them apart otherwise.
    """
    return f"Question: {question}\nContext: " + _citer_passage(i, passage)


def check_row(row: Mapping[str, Any], number: int = 0) -> tuple[str, list[dict[str, str]], str | None]:
    """Question, passages and answer of a row to train on or to answer (then without answer).

    Raises:
        ValueError, TypeError: one of them is missing, empty, or of another kind.
    """
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"row {number} has the question {question!r}: it has to be a text that is not empty.")
    given = as_list(row.get("passages"))
    passages = read_passages(given or [], f"row {number}")
    if (indices := read_indices(given or [], f"row {number}")) != [*range(1, len(indices) + 1)]:
        raise ValueError(
            f"row {number} ({question!r}) has passages with the `index` {indices}, and a prompt numbers them by their "
            "order: its answer would point to others. Run build_citation_dataset first, which renumbers it."
        )
    if not passages:
        raise ValueError(f"row {number} ({question!r}) has no passages: there is nothing to cite. Drop it.")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise ValueError(f"row {number} ({question!r}) has the answer {answer!r}: drop it, or leave `answer` out.")
    return question, passages, answer


class Fitter:
    """Makes rows fit: prompts and answers of at most `max_length` tokens.

    Args:
        tokenizer: of the model.
        format: "alce", "citer" or a `CitationFormat`.
        max_length: tokens of prompt and answer together, the end of the text or turn included; None for no limit.
        chat: whether the prompt is a user's turn and the answer the assistant's; None for whether the tokenizer has a
            chat template.

    Attributes:
        shortened: how many rows had passages cut so far.
        cut: how many tokens of passages these lost.
    """

    def __init__(self, tokenizer: Any, format: str | CitationFormat, max_length: int | None, chat: bool | None) -> None:
        self.tokenizer, self.format, self.max_length = tokenizer, find_format(format), max_length
        self.chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
        if self.chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError("chat=True, and the tokenizer has no chat template: give it one, or pass chat=False.")
        if not self.chat and tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no eos_token, so a model can't learn where an answer ends: set one.")
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise ValueError(f"max_length={max_length!r}: a positive number of tokens, or None for no limit.")
        self.shortened = self.cut = 0

    def turns(self, question: str, passages: Sequence[Passage], answer: str | None) -> tuple[Any, Any]:
        """Prompt and completion, as texts or as lists of messages."""
        prompt = self.format.prompt(question, passages, self.chat)
        if not self.chat:
            return prompt, None if answer is None else f" {answer}{self.tokenizer.eos_token}"
        completion = None if answer is None else [{"role": "assistant", "content": answer}]
        return [{"role": "user", "content": prompt}], completion

    def tokens(self, prompt: Any, completion: Any) -> tuple[list[int], int]:
        """The ids of prompt and completion, and how many of them are the prompt's; as SFTTrainer makes them."""
        if self.chat:
            start = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            if completion is None:
                return start, len(start)
            whole = self.tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
        else:
            start = self.tokenizer(prompt)["input_ids"]
            if completion is None:
                return start, len(start)
            whole = self.tokenizer(prompt + completion)["input_ids"]
        same = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))
        return whole, min(same, len(whole))

    def fit(self, question: str, passages: Sequence[Passage], answer: str | None, number: int = 0) -> tuple[Any, Any]:
        """Prompt and completion of at most `max_length` tokens, with passages cut where it takes that.

        Raises:
            ValueError: not even without the texts of the passages are they short enough.
        """
        turns = self.turns(question, passages, answer)
        length = len(self.tokens(*turns)[0])
        if self.max_length is None or length <= self.max_length:
            return turns
        bare = [{**passage, "text": ""} for passage in passages]
        fixed = len(self.tokens(*self.turns(question, bare, answer))[0])
        if fixed + len(passages) > self.max_length:
            raise ValueError(
                f"row {number} ({question!r}) needs {fixed} tokens without the texts of its {len(passages)} passages, "
                f"and max_length is {self.max_length}. Question and answer are never cut: raise max_length, give fewer "
                "passages, or drop the row."
            )
        before, room = length, self.max_length - fixed
        while length > self.max_length:  # joined texts can have a few tokens more than their parts
            shorter = self._shorten(passages, room)
            turns = self.turns(question, shorter, answer)
            length = len(self.tokens(*turns)[0])
            room -= max(length - self.max_length, 1)
        self.shortened += 1
        self.cut += before - length
        return turns

    def _shorten(self, passages: Sequence[Passage], room: int) -> list[dict[str, str]]:
        ids = [self.tokenizer(passage["text"], add_special_tokens=False)["input_ids"] for passage in passages]
        keep = share([len(each) for each in ids], max(room, 0))
        return [
            {**p, "text": p["text"] if n >= len(each) else _cut(self.tokenizer, p["text"], each, n)}
            for p, each, n in zip(passages, ids, keep, strict=True)
        ]

    def say(self) -> None:
        """Warn of the rows that were shortened, if any."""
        if self.shortened:
            warnings.warn(
                f"passages were cut in {self.shortened} rows, by {self.cut} tokens in all, to fit into max_length="
                f"{self.max_length}; questions and answers are whole. A citation may point to what was cut off.",
                stacklevel=3,
            )


def share(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each length is kept, so that the sum is at most `room`: all up to one level, and none above it."""
    keep, left = [0] * len(lengths), room
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for place, i in enumerate(order):
        keep[i] = min(lengths[i], left // (len(order) - place))
        left -= keep[i]
    return keep


def _cut(tokenizer: Any, text: str, ids: list[int], count: int) -> str:
    """The first `count` tokens of a text, as they stand in it."""
    if not tokenizer.is_fast:
        return str(tokenizer.decode(ids[:count], skip_special_tokens=True)).rstrip()
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[count - 1][1]].rstrip() if count else ""


def citation_prompt_completion(
    dataset: Any,
    tokenizer: Any,
    *,
    format: str | CitationFormat = "alce",
    max_length: int | None = 1024,
    chat: bool | None = None,
) -> Any:
    """Rows of `build_citation_dataset` as `prompt` and `completion`, which `trl.SFTTrainer` takes as they are.

    SFTTrainer then trains on the completion alone, pads, packs or goes padding-free. Give it the same `max_length` or a
    larger one, so that it has nothing left to cut: it would cut the end of the answer.

    Args:
        dataset: a `datasets.Dataset` with `question`, `passages` and `answer`.
        tokenizer: of the model.
        format: "alce" (Question, then `Document [1](Title: ...): ...`), "citer" (Query, then Context with `[1] ...`),
            or a `CitationFormat`.
        max_length: as many tokens as prompt and completion have together at most, None for no limit. Passages are cut
            to reach it, with a warning that says how many; questions and answers never are.
        chat: texts or messages; None for messages where the tokenizer has a chat template.

    Returns:
        A dataset with the columns `prompt` and `completion` alone.

    Raises:
        ValueError, TypeError: a row has no question, passages or answer, or is too long without its passages.

    Source: the layouts of T. Gao et al.: Enabling Large Language Models to Generate Text with Citations, EMNLP 2023,
    arXiv 2305.14627, and of M. Tahaei et al.: Efficient Citer, NAACL 2024 Findings; the wording is ours. Whether the
    latter mask the prompt in the loss is not stated; here it is masked.
    """
    from datasets import Dataset

    fitter = Fitter(tokenizer, format, max_length, chat)
    made = []
    for number, row in enumerate(dataset):
        question, passages, answer = check_row(row, number)
        if answer is None:
            raise ValueError(f"row {number} ({question!r}) has no answer: there is nothing to learn. Drop it.")
        prompt, completion = fitter.fit(question, passages, answer, number)
        made.append({"prompt": prompt, "completion": completion})
    fitter.say()
    return Dataset.from_list(made)
