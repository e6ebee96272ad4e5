"""Moved to `peft_dynamic.trainers.rewards.nlu`; the names of before are still here."""

from peft_dynamic.trainers.rewards.nlu import *  # noqa: F403  # whatever it has: one list of the names, there
