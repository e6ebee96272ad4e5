"""Moved to `peft_dynamic.density.trainer_step`; the names of before are still here."""

from peft_dynamic.density.trainer_step import *  # noqa: F403  # whatever it has: one list of the names, there
