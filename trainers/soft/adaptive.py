"""Moved to `peft_dynamic.exits.adaptive`; the names of before are still here."""

from peft_dynamic.exits.adaptive import PAPER_THRESHOLDS, AdaptiveOutput, generate_adaptive, paper_thresholds

__all__ = ["PAPER_THRESHOLDS", "AdaptiveOutput", "generate_adaptive", "paper_thresholds"]
