"""Moved to `peft_dynamic.exits.sections`; the names of before are still here."""

from peft_dynamic.exits.sections import Sections, in_sections

__all__ = ["Sections", "in_sections"]
