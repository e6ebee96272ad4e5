"""Moved to `peft_dynamic.citations.text`; the names of before are still here."""

from peft_dynamic.citations.text import *  # noqa: F403  # whatever it has: one list of the names, there
