"""Moved to `peft_dynamic.citations.text`; the names of before are still here."""

from peft_dynamic.citations.text import (
    Citation,
    cited_ids,
    find_citations,
    hidden_citations,
    map_citations,
    normalise_citations,
    sentence_citations,
    split_sentences,
    strip_citations,
)

__all__ = [
    "Citation",
    "cited_ids",
    "find_citations",
    "hidden_citations",
    "map_citations",
    "normalise_citations",
    "sentence_citations",
    "split_sentences",
    "strip_citations",
]
