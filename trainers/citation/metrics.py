"""Moved to `peft_dynamic.citations.metrics`; the names of before are still here."""

from peft_dynamic.citations.metrics import (
    Splitter,
    cited,
    evaluated_part,
    exact_match,
    list_scores,
    listed,
    mauve,
    mauve_text,
    normalised,
    rouge_lsum,
    sentence_splitter,
    without_citations,
)

__all__ = [
    "Splitter",
    "cited",
    "evaluated_part",
    "exact_match",
    "list_scores",
    "listed",
    "mauve",
    "mauve_text",
    "normalised",
    "rouge_lsum",
    "sentence_splitter",
    "without_citations",
]
