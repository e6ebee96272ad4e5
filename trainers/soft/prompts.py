"""Moved to `peft_dynamic.exits.prompts`; the names of before are still here."""

from peft_dynamic.exits.prompts import Prompts, check_generation_config, prepared

__all__ = ["Prompts", "check_generation_config", "prepared"]
