"""Moved to `peft_dynamic.citations.entailment`; the names of before are still here."""

from peft_dynamic.citations.entailment import (
    TRUE_ANSWERS,
    TRUE_MODEL,
    TRUE_TEMPLATE,
    EntailmentCache,
    EntailmentModel,
    Judge,
    measure_entailment,
    probabilities,
)

__all__ = [
    "TRUE_ANSWERS",
    "TRUE_MODEL",
    "TRUE_TEMPLATE",
    "EntailmentCache",
    "EntailmentModel",
    "Judge",
    "measure_entailment",
    "probabilities",
]
