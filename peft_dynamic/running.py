"""Moved to `peft_dynamic.hosts.running`; the names of before are still here."""

from peft_dynamic.hosts.running import call_frame, is_running, runs_in_thread

__all__ = ["call_frame", "is_running", "runs_in_thread"]
