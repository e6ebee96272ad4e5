"""Moved to `peft_dynamic.tuners.dylora.ranks`; the names of before are still here."""

from peft_dynamic.tuners.dylora.ranks import find_bases, prepare

__all__ = ["find_bases", "prepare"]
