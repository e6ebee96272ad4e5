"""Moved to `peft_dynamic.exits.layers`; the names of before are still here."""

from peft_dynamic.exits.layers import *  # noqa: F403  # whatever it has: one list of the names, there
