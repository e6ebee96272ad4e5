"""Moved to `peft_dynamic.tuners.also_trained`; the names of before are still here."""

from peft_dynamic.tuners.also_trained import AlsoTrained, Extras, check_train

__all__ = ["AlsoTrained", "Extras", "check_train"]
