"""Moved to `peft_dynamic.tuners.dylora.ranks`; the names of before are still here."""

from peft_dynamic.tuners.dylora.ranks import RankedFactor as RankView

__all__ = ["RankView"]
