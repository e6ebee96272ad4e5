"""Moved to `peft_dynamic.hosts.offload`; the names of before are still here."""

from peft_dynamic.hosts.offload import real

__all__ = ["real"]
