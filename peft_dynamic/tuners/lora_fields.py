"""What the fields of `LoraConfig` may hold, and which of them a method of ours cannot honour: refused by name.

PEFT checks few of them when a configuration is made; the rest fails in the middle of an injection, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from numbers import Integral, Real
from typing import Any

from peft import LoraConfig

# init_lora_weights values whose start leaves the base weights alone and does not count on the product B A.
ALLOWED_INITS = (True, False, "gaussian")


def is_int(value: Any) -> bool:
    """Whether it is an integer, of numpy too, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number, of numpy too, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is a finite number, of numpy too, and no bool."""
    return is_number(value) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(item, str) for item in value)


def _is_ints(value: Any) -> bool:
    return isinstance(value, list | tuple | set) and all(map(is_int, value))


def _is_pattern(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Mapping) and all(isinstance(key, str) and check(item) for key, item in value.items())
    )


def _is_tokens(value: Any) -> bool:
    return _is_ints(value) or (isinstance(value, Mapping) and all(_is_ints(ids) for ids in value.values()))


def _is_replication(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_ints(pair) and len(pair) == 2 for pair in value)


_FLAG = ("True or False", lambda value: isinstance(value, bool))
_TEXT = ("a text or None", lambda value: value is None or isinstance(value, str))
_NAMES = (
    "a list of names, a regular expression or None",
    lambda value: value is None or isinstance(value, str) or _is_names(value),
)
_LISTED = ("a list of names or None", lambda value: value is None or _is_names(value))
# Field: (what it must be, whether it is). Those of `ANY` are PEFT's to read, or refused by each method that lacks them.
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lora_alpha": ("a number above 0, and finite", lambda value: is_finite(value) and value > 0),
    "lora_dropout": ("a number from 0 to below 1", lambda value: is_finite(value) and 0 <= value < 1),
    "rank_pattern": (
        "a dict from names to ints of at least 1",
        lambda value: value is None or _is_pattern(is_int)(value),
    ),
    "alpha_pattern": (
        "a dict from names to finite numbers above 0",
        lambda value: value is None or _is_pattern(lambda item: is_finite(item) and item > 0)(value),
    ),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": _LISTED,
    "target_parameters": _LISTED,
    "layers_to_transform": (
        "an int, a list of ints or None",
        lambda value: value is None or is_int(value) or _is_ints(value),
    ),
    "layers_pattern": _NAMES,
    "layer_replication": ("a list of pairs of ints or None", lambda value: value is None or _is_replication(value)),
    "trainable_token_indices": (
        "a list of ints, a dict from names to such lists, or None",
        lambda value: value is None or _is_tokens(value),
    ),
    "bias": ("'none', 'all' or 'lora_only'", lambda value: value in ("none", "all", "lora_only")),
    "fan_in_fan_out": _FLAG,
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "use_qalora": _FLAG,
    "lora_bias": _FLAG,
    "ensure_weight_tying": _FLAG,
    "inference_mode": _FLAG,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
}
ANY = {
    "r",
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "init_lora_weights",
        "megatron_config",
        "megatron_core",
    ),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "alora_invocation_tokens"),
    *("qalora_group_size", "monteclora_config", "runtime_config", "use_bdlora", "arrow_config", "kasa_config"),
}


def _default(field: Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def check_lora_fields(config: Any, skip: tuple[str, ...] = ()) -> None:
    """Check the fields that a configuration has from `LoraConfig`, before anything reads them; numpy's become Python's.

    Raises:
        TypeError, ValueError: one holds what has no meaning, or is of a newer PEFT and not known here.
    """
    name = type(config).__name__
    if "r" not in skip:
        if not is_int(config.r):
            raise TypeError(f"{name}: r must be an int, got {config.r!r} of type {type(config.r).__name__}.")
        if config.r < 1:
            raise ValueError(f"{name}: r must be at least 1, got {config.r}.")
    config.r = plain(config.r)
    for field in fields(LoraConfig):
        value = getattr(config, field.name)
        if field.name in RULES and field.name not in skip:
            rule, holds = RULES[field.name]
            if not _holds(holds, value):
                kind = ValueError if is_number(value) else TypeError
                raise kind(
                    f"{name}: {field.name} must be {rule}, got {value!r} of type {type(value).__name__}. "
                    f"PEFT's default is {_default(field)!r}."
                )
            setattr(config, field.name, plain(value))
        elif field.name not in RULES and field.name not in ANY and value != _default(field):
            raise ValueError(
                f"{name} does not support {field.name}={value!r}: this version of peft_dynamic does not know the field "
                "and cannot say what it does at every rank. Leave it at its default."
            )


def _holds(check: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(check(value))
    except (TypeError, ValueError):  # an array, say, has no one truth value
        return False


def plain(value: Any) -> Any:
    """The value with Python's numbers in place of numpy's, which no JSON can hold."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return value if isinstance(value, float) and type(value) is float else float(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(map(plain, value))
    return value


def check_refused(config: Any, refused: dict[str, str]) -> None:
    """Raise ValueError for a field in `refused` (name to reason) that is set."""
    for name, reason in refused.items():
        if getattr(config, name, None):
            raise ValueError(f"{type(config).__name__} does not support {name}={getattr(config, name)!r}: {reason}.")


def check_init(config: Any, reason: str) -> None:
    """Raise ValueError for an `init_lora_weights` that sets more than a start for A and B."""
    value = config.init_lora_weights
    if not any(value is allowed or (isinstance(value, str) and value == allowed) for allowed in ALLOWED_INITS):
        raise ValueError(
            f"{type(config).__name__} does not support init_lora_weights={value!r}: {reason}. Pass True, False or "
            "'gaussian'."
        )
