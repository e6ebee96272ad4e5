"""Moved to `peft_dynamic.trainers.rewards.nlu_eval`; the names of before are still here."""

from peft_dynamic.trainers.rewards.nlu_eval import *  # noqa: F403  # whatever it has: one list of the names, there
