"""Moved to `peft_dynamic.citations.rows`; the names of before are still here."""

from peft_dynamic.citations.rows import Passage, Row, read_rows

__all__ = ["Passage", "Row", "read_rows"]
