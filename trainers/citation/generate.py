"""Answers to questions with passages, by a model of either kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peft_dynamic.hosts.modes import eval_mode
from peft_dynamic.trainers.citation.collators import CitationDataCollator, FiDDataCollator


@torch.no_grad()
def answer_questions(
    model: Any,
    collator: CitationDataCollator | FiDDataCollator,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 4,
    **generate: Any,
) -> list[str]:
    """The answers of a decoder-only or FiD model, in eval mode; the mode it was in comes back afterwards.

    Args:
        model: with or without adapters.
        collator: the one that it was trained with: prompts are then the same.
        rows: dicts with `question` and `passages`; an `answer` is not looked at.
        batch_size: how many questions go together.
        **generate: what `model.generate` takes. The papers' settings are num_beams=5, do_sample=True, top_p=0.95 (FiD)
            and num_beams=4, do_sample=True, top_k=40 (decoder). Without `max_new_tokens` it is 256.

    Returns:
        A text per row, for `evaluate_citations([{**row, "output": text} ...])`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: a positive number of questions.")
    options = {"max_new_tokens": 256} | generate
    answers = []
    with eval_mode(model):
        for start in range(0, len(rows), batch_size):
            asked = [{key: row[key] for key in ("question", "passages")} for row in rows[start : start + batch_size]]
            batch = {name: value.to(model.device) for name, value in collator(asked).items()}
            prompt = 0 if batch["input_ids"].dim() == 3 else batch["input_ids"].shape[1]
            made = model.generate(**batch, **options)[:, prompt:]
            answers += collator.tokenizer.batch_decode(made, skip_special_tokens=True)
    return [answer.strip() for answer in answers]
