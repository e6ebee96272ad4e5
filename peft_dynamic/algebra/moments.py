"""Moved to `peft_dynamic.tuners.moments`; the names of before are still here."""

from peft_dynamic.tuners.moments import *  # noqa: F403  # whatever it has: one list of the names, there
