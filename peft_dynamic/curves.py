"""Moved to `peft_dynamic.reports.curve`; the names of before are still here."""

from peft_dynamic.hosts.modes import evaluating as evaluating
from peft_dynamic.reports.curve import *  # noqa: F403  # whatever it has: one list of the names, there
