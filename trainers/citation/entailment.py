"""Moved to `peft_dynamic.citations.entailment`; the names of before are still here."""

from peft_dynamic.citations.entailment import *  # noqa: F403  # whatever it has: one list of the names, there
