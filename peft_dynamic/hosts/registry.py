"""Registers our tuners with PEFT: the only file that touches `PeftType` and PEFT's mappings.

PEFT has no entry points, and `register_peft_method` refuses a name that `PeftType` lacks. A plain string key would half
work (PEFT uses `.value` and `str(member)` in its status and error paths), so a real member is added to the enum.
"""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


def add_peft_type(name: str) -> Any:
    """Return `PeftType.<name>`, adding the member first where PEFT lacks it.

    Args:
        name: upper-case name, e.g. "DYLORA".

    Raises:
        ImportError: PEFT already has a type of this name that is not ours.
    """
    existing = PeftType.__members__.get(name)
    if existing is not None:
        if getattr(existing, "_added_by_peft_dynamic", False):
            return existing
        raise ImportError(
            f"PEFT already has a method named {name}, so peft_dynamic cannot register its own: adapters saved as it "
            f"would be ambiguous. Use PEFT's {name}, or install the peft version that this peft_dynamic names."
        )
    member: Any = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    member._added_by_peft_dynamic = True
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def is_ours(config: Any) -> bool:
    """Whether an adapter's configuration is of a method that this package registered."""
    member = PeftType.__members__.get(str(getattr(config.peft_type, "value", config.peft_type)))
    return bool(getattr(member, "_added_by_peft_dynamic", False))


def register(name: str, config_cls: type, model_cls: Any) -> None:
    """Register one tuner under PEFT's `name` (lower case); doing it again with the same classes changes nothing.

    Raises:
        ImportError: PEFT, or another plugin, already has a method of this name.
    """
    peft_type = add_peft_type(name.upper())
    if peft_type in PEFT_TYPE_TO_TUNER_MAPPING:
        if PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] is config_cls and PEFT_TYPE_TO_TUNER_MAPPING[peft_type] is model_cls:
            return
        raise ImportError(
            f"{name.upper()} is already registered with PEFT by {PEFT_TYPE_TO_TUNER_MAPPING[peft_type]!r}: two "
            "copies of peft_dynamic are on the path, or another package uses the name. Remove one of them."
        )
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
