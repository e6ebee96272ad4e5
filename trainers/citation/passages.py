"""Moved to `peft_dynamic.citations.passages`; the names of before are still here."""

from peft_dynamic.citations.passages import as_list, as_records, half_character, is_missing, read_index, read_indices

__all__ = ["as_list", "as_records", "half_character", "is_missing", "read_index", "read_indices"]
