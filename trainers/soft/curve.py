"""Moved to `peft_dynamic.exits.curve`; the names of before are still here."""

from peft_dynamic.exits.curve import LATENCY, ExitCurve, ExitRow, exit_curve

__all__ = ["LATENCY", "ExitCurve", "ExitRow", "exit_curve"]
