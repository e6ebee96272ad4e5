"""Moved to `peft_dynamic.citations.metrics`; the names of before are still here."""

from peft_dynamic.citations.metrics import *  # noqa: F403  # whatever it has: one list of the names, there
