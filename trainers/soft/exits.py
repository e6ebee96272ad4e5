"""Moved to `peft_dynamic.exits.layers`; the names of before are still here."""

from peft_dynamic.exits.layers import (
    Shown,
    check_exit,
    check_exits_work,
    depth_of,
    exit_at,
    shown_layers,
    truncate_to_exit,
)
from peft_dynamic.hosts.probe import alike, trial, trial_logits

__all__ = [
    "Shown",
    "alike",
    "check_exit",
    "check_exits_work",
    "depth_of",
    "exit_at",
    "shown_layers",
    "trial",
    "trial_logits",
    "truncate_to_exit",
]
