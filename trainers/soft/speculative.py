"""Moved to `peft_dynamic.exits.speculative`; the names of before are still here."""

from peft_dynamic.exits.speculative import SpeculativeOutput, assisted_exit, generate_speculative

__all__ = ["SpeculativeOutput", "assisted_exit", "generate_speculative"]
