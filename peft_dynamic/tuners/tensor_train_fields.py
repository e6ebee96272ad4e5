"""Checks of the fields that both LoRETTA configurations have."""

import math
from collections.abc import Sequence
from typing import Any

from peft_dynamic.rules import is_int
from peft_dynamic.tuners.lora_fields import check_size


def check_tt_fields(config: Any) -> None:
    """Raise unless `bottleneck`, `tensor_rank` and `tensor_shape` can be a tensor train's."""
    name = type(config).__name__
    for field in ("bottleneck", "tensor_rank"):
        value = getattr(config, field)
        if not is_int(value):
            raise TypeError(f"{name}: {field} must be an int, got {value!r} of {type(value).__name__}.")
        check_size(name, field, value)
        setattr(config, field, int(value))
    shape = config.tensor_shape
    if shape is None:
        return
    if isinstance(shape, str) or not isinstance(shape, Sequence) or not all(map(is_int, shape)):
        raise TypeError(f"{name}: tensor_shape must be a list of ints or None, got {shape!r}.")
    config.tensor_shape = shape = [int(factor) for factor in shape]
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"{name}: tensor_shape needs at least two factors, each at least 1, got {shape!r}. Pass None for an "
            "automatic shape."
        )
    if math.prod(shape) % config.bottleneck:
        raise ValueError(
            f"{name}: the factors of tensor_shape must multiply to features * bottleneck, but {math.prod(shape)}, the "
            f"product of {shape}, is no multiple of bottleneck={config.bottleneck}. Pass None for an automatic shape."
        )
