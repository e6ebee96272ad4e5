"""Moved to `peft_dynamic.reports.curve`; the names of before are still here."""

from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.reports.curve import (
    GREATER_IS_BETTER,
    LOWER_IS_BETTER,
    PLOT_SUFFIXES,
    PREFIXES,
    Curve,
    R,
    Row,
    T,
    as_text,
    direction,
    measured,
    new_figure,
    number,
    picture_path,
    read_json,
    write_json,
)

__all__ = [
    "GREATER_IS_BETTER",
    "LOWER_IS_BETTER",
    "PLOT_SUFFIXES",
    "PREFIXES",
    "Curve",
    "R",
    "Row",
    "T",
    "as_text",
    "direction",
    "evaluating",
    "measured",
    "new_figure",
    "number",
    "picture_path",
    "read_json",
    "write_json",
]
