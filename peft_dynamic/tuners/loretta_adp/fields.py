"""Moved to `peft_dynamic.tuners.tensor_train_fields`; the names of before are still here."""

from peft_dynamic.tuners.tensor_train_fields import check_tt_fields as check_train_fields

__all__ = ["check_train_fields"]
