"""Moved to `peft_dynamic.citations.evaluate`; the names of before are still here."""

from peft_dynamic.citations.answers import Answer, Sentence
from peft_dynamic.citations.evaluate import ALCE_MAX_CITATIONS, evaluate_citations
from peft_dynamic.citations.result import CitationEvaluation

__all__ = ["ALCE_MAX_CITATIONS", "Answer", "CitationEvaluation", "Sentence", "evaluate_citations"]
