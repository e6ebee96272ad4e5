"""Batches of cited answers: for decoder-only models, and for Fusion-in-Decoder.

Notable: both take the rows of `build_citation_dataset` as they are, so set `remove_unused_columns=False` in the
training arguments. Rows without `answer` become inputs to generate from.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peft_dynamic.trainers.citation.formats import CitationFormat, Fitter, check_row, fid_input

IGNORED = -100


def _all_or_none(answers: Sequence[str | None]) -> bool:
    """Whether the rows have answers; mixed batches are refused."""
    if any(answer is None for answer in answers) and any(answer is not None for answer in answers):
        raise ValueError("some rows of this batch have an answer and some have none: train or generate, not both.")
    return answers[0] is not None


def _pad(rows: Sequence[Sequence[int]], value: int, left: bool = False, multiple: int | None = None) -> torch.Tensor:
    width = max(map(len, rows))
    width = width if multiple is None else -(-width // multiple) * multiple
    return torch.tensor(
        [[value] * (width - len(r)) + [*r] if left else [*r] + [value] * (width - len(r)) for r in rows]
    )


class CitationDataCollator:
    """Prompts and cited answers as a batch for a decoder-only model, with the loss on the answers.

        settings = SFTConfig("out", remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
                             bf16=torch.cuda.is_available())  # TRL's default needs a GPU
        train = Dataset.from_list(rows)
        trainer = SFTTrainer(model, settings, train_dataset=train, data_collator=CitationDataCollator(tokenizer))

    or under `transformers.Trainer`, or a loop. The tokens are those that SFTTrainer makes of
    `citation_prompt_completion`, which is the way to packing and padding-free training.

    Args:
        tokenizer: of the model.
        format: "alce", "citer" or a `CitationFormat`.
        max_length: tokens of a row at most, None for no limit. To reach it passages are cut, never a question or an
            answer; the first time that happens there is a warning, and `shortened` and `cut` count.
        chat: whether prompts are a user's turn; None for whether the tokenizer has a chat template.
        pad_to_multiple_of: round the width of a batch up to a multiple.

    Returns:
        Of a call with a list of rows: `input_ids` and `attention_mask` (batch, tokens), and where the rows have
        answers `labels` (batch, tokens), -100 at prompts and padding. Without answers the padding is on the left.
    """

    def __init__(
        self,
        tokenizer: Any,
        format: str | CitationFormat = "alce",
        max_length: int | None = 1024,
        chat: bool | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self._fitter = Fitter(tokenizer, format, max_length, chat)
        self.tokenizer = tokenizer
        self._pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    @property
    def shortened(self) -> int:
        """How many rows had passages cut so far."""
        return self._fitter.shortened

    @property
    def cut(self) -> int:
        """How many tokens of passages were cut so far."""
        return self._fitter.cut

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        read = [check_row(row, number) for number, row in enumerate(rows)]
        trains = _all_or_none([answer for _, _, answer in read])
        before, ids, starts = self.shortened, [], []
        for number, (question, passages, answer) in enumerate(read):
            tokens, start = self._fitter.tokens(*self._fitter.fit(question, passages, answer, number))
            ids.append(tokens)
            starts.append(start)
        if self.shortened and not before:
            self._fitter.say()
        left, multiple = not trains, self.pad_to_multiple_of
        batch = {
            "input_ids": _pad(ids, self._pad_id, left, multiple),
            "attention_mask": _pad([[1] * len(row) for row in ids], 0, left, multiple),
        }
        if trains:
            labels = [[IGNORED] * start + row[start:] for row, start in zip(ids, starts, strict=True)]
            batch["labels"] = _pad(labels, IGNORED, left, multiple)
        return batch


class FiDDataCollator:
    """Passages side by side as a batch for `FiDForConditionalGeneration`, each with the question and its number.

    Each encoder input is `Question: ...`, a line break, `Context: [i] title: text`. Too long ones lose the end of their
    text, which is the last thing in them.

    Args:
        tokenizer: of the model.
        max_length: tokens of one encoder input at most (256 in the paper).
        max_answer_length: tokens of an answer at most; None for no limit. A longer one is an error, never cut.
        pad_to_multiple_of: round the widths of a batch up to a multiple.

    Attributes:
        shortened: how many passages were cut so far.
        cut: how many tokens these lost. The first time there is a warning.

    Returns:
        Of a call with a list of rows: `input_ids` and `attention_mask` (batch, passages, tokens), where a row with
        fewer passages than the batch's most has a mask of zeros for those that it lacks; and where the rows have
        answers `labels` (batch, answer tokens), -100 at padding.

    Source: G. Izacard, E. Grave: Leveraging Passage Retrieval with Generative Models for Open Domain
    Question Answering, EACL 2021, arXiv 2007.01282, for the layout; M. Tahaei et al.: Efficient Citer, NAACL 2024
    Findings, for the number within the input.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int = 256,
        max_answer_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no pad_token or no eos_token: FiD needs that of a T5 checkpoint.")
        probe = tokenizer.decode(tokenizer("So [1][12].")["input_ids"], skip_special_tokens=True).replace(" ", "")
        if "[1][12]" not in probe:
            raise ValueError(
                f"the tokenizer makes {probe!r} of 'So [1][12].', so that it has no way to write citations."
            )
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length={max_length!r}: a positive number of tokens per encoder input.")
        self.tokenizer, self.max_length, self.max_answer_length = tokenizer, max_length, max_answer_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.shortened = self.cut = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        read = [check_row(row, number) for number, row in enumerate(rows)]
        trains = _all_or_none([answer for _, _, answer in read])
        before = self.shortened
        encoded = [
            [self._encode(number, i, question, passage) for i, passage in enumerate(passages, 1)]
            for number, (question, passages, _) in enumerate(read)
        ]
        if self.shortened and not before:
            warnings.warn(
                f"a passage is longer than the encoder's max_length={self.max_length} and was cut, as others will be: "
                "`shortened` and `cut` of the collator count them. A citation may point to what was cut off.",
                stacklevel=2,
            )
        most = max(map(len, encoded))
        flat = [ids for row in encoded for ids in row + [[]] * (most - len(row))]
        batch = {
            "input_ids": _pad(flat, self.tokenizer.pad_token_id, multiple=self.pad_to_multiple_of),
            "attention_mask": _pad([[1] * len(ids) for ids in flat], 0, multiple=self.pad_to_multiple_of),
        }
        batch = {name: value.view(len(rows), most, -1) for name, value in batch.items()}
        if trains:
            labels = [self._answer(number, question, answer) for number, (question, _, answer) in enumerate(read)]
            batch["labels"] = _pad(labels, IGNORED, multiple=self.pad_to_multiple_of)
        return batch

    def _encode(self, number: int, i: int, question: str, passage: Mapping[str, str]) -> list[int]:
        ids: list[int] = self.tokenizer(fid_input(i, question, passage))["input_ids"]
        if len(ids) <= self.max_length:
            return ids
        ends = len(ids) - len(self.tokenizer(fid_input(i, question, passage), add_special_tokens=False)["input_ids"])
        fixed = len(self.tokenizer(fid_input(i, question, {**passage, "text": ""}))["input_ids"])
        if fixed >= self.max_length:
            raise ValueError(
                f"row {number} ({question!r}): question and title of passage {i} take {fixed} tokens, and max_length "
                f"is {self.max_length}. They are never cut: raise max_length, or drop the row."
            )
        self.shortened += 1
        self.cut += len(ids) - self.max_length
        return ids[: self.max_length - ends] + ids[len(ids) - ends :]

    def _answer(self, number: int, question: str, answer: str | None) -> list[int]:
        ids: list[int] = self.tokenizer(text_target=answer)["input_ids"]
        if self.max_answer_length is not None and len(ids) > self.max_answer_length:
            raise ValueError(
                f"row {number} ({question!r}) has an answer of {len(ids)} tokens, and max_answer_length is "
                f"{self.max_answer_length}. Answers are never cut: raise it, or drop the row."
            )
        return ids
