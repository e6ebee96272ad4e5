"""Moved to `peft_dynamic.tuners.also_trained`; the names of before are still here."""

from peft_dynamic.tuners.also_trained import AlsoTrained, Extras
from peft_dynamic.tuners.also_trained import check_tt_shape as check_train

__all__ = ["AlsoTrained", "Extras", "check_train"]
