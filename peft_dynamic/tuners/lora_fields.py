"""What the fields of `LoraConfig` may hold, and which of them a method of ours cannot honour: refused by name.

PEFT checks few of them when a configuration is made; the rest fails in the middle of an injection, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from peft import LoraConfig, TaskType
from peft.tuners.lora import config as lora_config

from peft_dynamic.methods import REFUSED, VARIANTS, method_of
from peft_dynamic.rules import (
    FLAG,
    TEXT,
    Rule,
    check_rules,
    default_of,
    is_expression,
    is_finite,
    is_int,
    or_none,
    plain,
)

MOST = 2**31 - 1  # of a size that torch takes
# init_lora_weights values whose start leaves the base weights alone and does not count on the product B A.
ALLOWED_INITS = (True, False, "gaussian")


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(item, str) and item for item in value)


def _is_ints(value: Any) -> bool:
    return isinstance(value, list | tuple | set) and all(map(is_int, value))


def _is_pattern(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Mapping) and all(is_expression(key) and check(item) for key, item in value.items())
    )


def _is_tokens(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(name, str) and _is_tokens(ids) for name, ids in value.items())
    return isinstance(value, list) and bool(value) and all(is_int(item) and item >= 0 for item in value)


def _is_replication(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_ints(pair) and len(pair) == 2 for pair in value)


def _part(name: str, holds: Callable[[Any], Any] = bool) -> Rule:
    """Of a field that holds a configuration of its own, which PEFT takes as a dict too."""
    kind = getattr(lora_config, name)
    return or_none(
        f"a {name}, a dict of its fields",
        lambda value: isinstance(value, kind | Mapping) and holds(value if isinstance(value, kind) else kind(**value)),
    )


NAMES = or_none("a list of names, a regular expression", lambda value: is_expression(value) or _is_names(value))
LISTED = or_none("a list of names", _is_names)
INDICES = or_none("an int, a list of ints", lambda value: is_int(value) or _is_ints(value))
TASK = or_none(
    f"one of {', '.join(task.value for task in TaskType)}", lambda value: value in [task.value for task in TaskType]
)
DICT = or_none("a dict", lambda value: isinstance(value, Mapping))
# Those of every configuration of PEFT's. `peft_type` is each class's own, whatever is passed.
COMMON: dict[str, Rule] = {
    "task_type": TASK,
    "auto_mapping": DICT,
    "peft_version": TEXT,
    "base_model_name_or_path": TEXT,
    "revision": TEXT,
    "inference_mode": FLAG,
}
# Of each field of `LoraConfig` but `r` and `peft_type`; tests/test_settings.py compares it with PEFT's.
RULES: dict[str, Rule] = COMMON | {
    "lora_alpha": ("a number above 0, and finite", lambda value: is_finite(value) and value > 0),
    "lora_dropout": ("a number from 0 to below 1", lambda value: is_finite(value) and 0 <= value < 1),
    "rank_pattern": or_none(
        "a dict from names to ints of at least 1", _is_pattern(lambda item: is_int(item) and item <= MOST)
    ),
    "alpha_pattern": or_none(
        "a dict from names to finite numbers above 0", _is_pattern(lambda item: is_finite(item) and item > 0)
    ),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "modules_to_save": LISTED,
    "target_parameters": LISTED,
    "layers_to_transform": INDICES,
    "layers_pattern": NAMES,
    "layer_replication": or_none("a list of pairs of ints", _is_replication),
    "trainable_token_indices": or_none("a list of token ids, a dict from names to such lists", _is_tokens),
    "bias": ("'none', 'all' or 'lora_only'", lambda value: value in ("none", "all", "lora_only")),
    "fan_in_fan_out": FLAG,
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "use_qalora": FLAG,
    "qalora_group_size": ("an int of at least 1", lambda value: is_int(value) and value > 0),
    "lora_bias": FLAG,
    "ensure_weight_tying": FLAG,
    "init_lora_weights": ("True, False or a name that PEFT knows", lambda value: isinstance(value, bool | str)),
    "megatron_config": DICT,
    "megatron_core": TEXT,
    "loftq_config": _part("LoftQConfig"),
    "eva_config": _part("EvaConfig"),
    "corda_config": _part("CordaConfig"),
    "lora_ga_config": _part("LoraGAConfig"),
    "velora_config": _part("VeloraConfig"),
    "monteclora_config": _part("MontecloraConfig"),
    "use_bdlora": _part("BdLoraConfig", lambda part: part.target_modules_bd_a or part.target_modules_bd_b),
    "arrow_config": _part("ArrowConfig"),
    "kasa_config": _part("KasaConfig"),
    "alora_invocation_tokens": or_none("a list of token ids", lambda value: _is_tokens(value)),
    "runtime_config": ("a LoraRuntimeConfig", lambda value: isinstance(value, lora_config.LoraRuntimeConfig)),
}


# What a file's configuration must tell before its factors can be read. A negative alpha turns an update around.
_OF_FILES: dict[str, Rule] = {
    "r": ("an int of at least 1", lambda value: is_int(value) and value >= 1),
    "lora_alpha": ("a finite number", is_finite),
    "rank_pattern": RULES["rank_pattern"],
    "alpha_pattern": or_none("a dict from names to finite numbers", _is_pattern(is_finite)),
    "target_modules": NAMES,
    "target_parameters": LISTED,
    "modules_to_save": LISTED,
    "base_model_name_or_path": TEXT,
}


def check_file_fields(config: LoraConfig) -> None:
    """Check what a stock LoRA's file says of its factors: PEFT reads it as it stands.

    Raises:
        TypeError, ValueError: a field holds what has no meaning.
    """
    check_rules(config, _OF_FILES)


def check_lora_fields(config: Any, skip: tuple[str, ...] = ()) -> None:
    """Check the fields that a configuration has from `LoraConfig`, before anything reads them; numpy's become Python's.

    Raises:
        TypeError, ValueError: one holds what has no meaning, or is of a newer PEFT and not known here.
    """
    name = type(config).__name__
    if "r" not in skip:
        if not is_int(config.r):
            raise TypeError(f"{name}: r must be an int, got {config.r!r} of type {type(config.r).__name__}.")
        check_size(name, "r", config.r)
    config.r = plain(config.r)
    check_rules(config, {field: rule for field, rule in RULES.items() if field not in skip})
    for pattern in ("rank_pattern", "alpha_pattern"):
        setattr(config, pattern, getattr(config, pattern) or {})  # None is a dict to read for PEFT
    check_known(config, LoraConfig, {"r", *RULES})


def check_ranks_of(config: Any) -> None:
    """Raise ValueError for a rank below 1 in `rank_pattern`."""
    for pattern, rank in config.rank_pattern.items():
        if rank < 1:
            raise ValueError(
                f"{type(config).__name__}: rank_pattern must have ints of at least 1, got {rank} for "
                f"{pattern!r}. To leave a module out name it in exclude_modules."
            )


def check_size(owner: str, name: str, value: int) -> None:
    """Raise ValueError for an int that can be no size of a tensor."""
    if value < 1:
        raise ValueError(f"{owner}: {name} must be at least 1, got {value}.")
    if value > MOST:
        raise ValueError(f"{owner}: {name} must be at most {MOST}, got {value}.")


def check_refused(config: Any, refused: dict[str, str]) -> None:
    """Raise ValueError for a field in `refused` (name to reason) that is set; an empty dict sets PEFT's too."""
    defaults = {field.name: default_of(field) for field in fields(config)}
    for name, reason in refused.items():
        value, default = getattr(config, name, None), defaults[name]
        if not any(value is unset for unset in (None, False, default)) and not (default == {} == value):
            raise ValueError(f"{type(config).__name__} does not support {name}={getattr(config, name)!r}: {reason}.")


def check_variant(config: Any, variant: Any, module: str) -> None:
    """Raise ValueError for a variant of LoRA that the configuration's method does not honour, or that we do not know.

    Args:
        config: of the adapter.
        variant: what PEFT has put into the layer's `lora_variant`; None for a plain LoRA.
        module: the layer, for the message.
    """
    method, kind = method_of(config), type(variant).__name__
    if variant is None or method is None:
        return
    field = next((name for name, starts in VARIANTS.items() if kind.startswith(starts)), None)
    if field is None or field in method.refused:
        reason = "this version of peft_dynamic does not know it" if field is None else method.refused[field]
        raise ValueError(
            f"{type(config).__name__} does not support {kind}, the variant of LoRA that PEFT made at {module!r}: "
            f"{reason}. Leave {field or 'the field that asks for it'} at its default."
        )


# Fields that make a stock LoRA more than a product B A, with what to do instead.
NO_PRODUCT = {
    "use_dora": "its magnitudes belong to the norm of one merged weight. Merge it into the base model",
    "lora_bias": "it has a bias beside its factors. Train without lora_bias, or merge it into the base model",
}
# What leaves the update the product of the factors: a scale, a parallel layout, starts that set the factors alone, and
# the choice of modules.
_HARMLESS = (
    *("use_rslora", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
)


def check_product(config: Any, named: str, more: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raise ValueError for an adapter whose update is more than the scaled product of its two factors.

    Args:
        config: a `LoraConfig`, or one of ours.
        named: the adapter, for the message.
        more: further fields that must not be set, and the reason.
    """
    reasons = NO_PRODUCT | dict(more)
    for name in (*reasons, *(name for name in REFUSED if name not in _HARMLESS)):
        value = getattr(config, name, None)
        if value not in (None, False, {}, []):
            reason = reasons.get(name, "its update is not the product of its factors. Merge it into the base model")
            raise ValueError(f"{named} has {name}={value!r}: {reason}.")
    start = str(getattr(config, "init_lora_weights", True))
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga", "mica")):
        raise ValueError(
            f"{named} was started with init_lora_weights={start!r}, which changed the base weights: its product is not "
            "its update. Save it with path_initial_model_for_weight_conversion first."
        )


def check_known(config: Any, kind: type, known: Collection[str]) -> None:
    """Raise ValueError for a field of PEFT's class `kind` that is set and has no rule: one of a newer PEFT."""
    for field in fields(kind):
        value = getattr(config, field.name)
        if field.name not in known and field.name != "peft_type" and value != default_of(field):
            raise ValueError(
                f"{type(config).__name__} does not support {field.name}={value!r}: this version of peft_dynamic does "
                "not know the field and cannot say what it does. Leave it at its default."
            )


def check_init(config: Any, reason: str, more: tuple[str, ...] = ()) -> None:
    """Raise ValueError for an `init_lora_weights` that sets more than a start for A and B."""
    value = config.init_lora_weights
    if not any(value is allowed or (isinstance(value, str) and value == allowed) for allowed in ALLOWED_INITS):
        raise ValueError(
            f"{type(config).__name__} does not support init_lora_weights={value!r}: {reason}. Pass True, False or "
            f"{' or '.join(map(repr, ('gaussian', *more)))}."
        )
