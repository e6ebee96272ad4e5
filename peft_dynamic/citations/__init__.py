"""Reading and scoring answers that cite their sources. How such answers are trained is `peft_dynamic.trainers`."""

from peft_dynamic.citations.entailment import EntailmentCache, EntailmentModel, measure_entailment
from peft_dynamic.citations.evaluate import evaluate_citations
from peft_dynamic.citations.result import CitationEvaluation

__all__ = [
    "CitationEvaluation",
    "EntailmentCache",
    "EntailmentModel",
    "evaluate_citations",
    "measure_entailment",
]
