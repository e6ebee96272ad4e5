"""Moved to `peft_dynamic.citations.report`; the names of before are still here."""

from peft_dynamic.citations.report import render, verdict

__all__ = ["render", "verdict"]
