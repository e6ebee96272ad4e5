"""What the settings of a density loss may be, and what they come to on a model's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_dynamic.density.structure import Activation, check_patterns
from peft_dynamic.functional.density import SURROGATES
from peft_dynamic.rules import is_finite


def layer_factors(
    layers: list[Activation], given: Sequence[float] | Mapping[str, float] | None, name: str
) -> dict[str, float]:
    """The factor of each layer in the density, by name."""
    names = [layer.name for layer in layers]
    if given is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(given, Mapping):
        factors = dict.fromkeys(names, 1.0)
        for key, value in given.items():
            matched = [each for each in names if each == key or each.endswith(f".{key}") or f".{key}." in f".{each}."]
            if not matched:
                raise ValueError(f"{name} has {key!r}, which is the name of no counted layer; there are {names}.")
            factors.update(dict.fromkeys(matched, float(value)))
        return factors
    if len(given) != len(names):
        raise ValueError(
            f"{name} must have one number for each of the {len(names)} layers {names}, got {len(given)}: {given!r}."
        )
    return dict(zip(names, map(float, given), strict=True))


def check_settings(
    owner: str, weight: Any, eps: Any, surrogate: Any, activation_modules: Any, layer_weights: Any, prefix: str = ""
) -> None:
    """Refuse settings without a meaning; `owner` and `prefix` make the names in the messages."""
    if not is_finite(weight) or weight < 0:
        raise ValueError(
            f"{owner}: {prefix}weight must be a number of at least 0, got {weight!r}. 0 switches the loss off."
        )
    if not is_finite(eps) or not eps > 0:
        raise ValueError(f"{owner}: {prefix}eps must be a positive number, got {eps!r}. The authors' is 1e-7.")
    if surrogate not in SURROGATES:
        raise ValueError(f"{owner}: surrogate must be one of {SURROGATES}, got {surrogate!r}.")
    check_patterns(activation_modules, owner)
    if layer_weights is not None:
        values = list(layer_weights.values()) if isinstance(layer_weights, Mapping) else layer_weights
        named = not isinstance(layer_weights, Mapping) or all(isinstance(key, str) for key in layer_weights)
        if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not named:
            raise TypeError(
                f"{owner}: {prefix}layer_weights must be a list of numbers or a dict from names to numbers, got "
                f"{layer_weights!r}."
            )
        off = not isinstance(layer_weights, Mapping) and not any(values)  # a dict leaves the others at 1
        if not all(is_finite(value) and value >= 0 for value in values) or off:
            raise ValueError(
                f"{owner}: {prefix}layer_weights must be numbers of at least 0, some of them above 0, got "
                f"{layer_weights!r}. To switch the loss off pass {prefix}weight=0."
            )
