"""Finds the activations of a model's feed-forward blocks: by structure, or by the user's pattern.

A block is an item of a list of layers each of which holds an attention. Its activations are the modules of an
activation class outside of the attention. In a gated block (SwiGLU, GeGLU) this is the gate's activation before it is
multiplied, as in the authors' code for Flan-T5: where it is 0, so is the product, whatever the other branch says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from peft_dynamic.hosts.blocks import base_model, is_below, named_attention, original_modules

_CLASS = re.compile("gelu|relu|silu|swish|mish|activation", re.IGNORECASE)
_HOMES = ("torch.nn.modules.activation", "transformers.activations")


class Activation(NamedTuple):
    """A module whose output is counted; `stack` is "encoder", "decoder" or, without such a pair, "model"."""

    name: str
    module: nn.Module
    stack: str


def check_patterns(patterns: Any, owner: str) -> None:
    """Refuse what cannot name activations; `owner` begins the message.

    Raises:
        TypeError, ValueError: it is no name, list of names, regular expression or None, or an empty one.
    """
    if patterns is None:
        return
    if isinstance(patterns, str):
        try:
            re.compile(patterns)
        except re.error as error:
            raise ValueError(
                f"{owner}: activation_modules={patterns!r} is no end of a name and no regular expression: {error}."
            ) from error
    elif not isinstance(patterns, list | tuple | set) or not all(isinstance(item, str) for item in patterns):
        raise TypeError(
            f"{owner}: activation_modules must be the end of a name, a regular expression or a list of names, "
            f"got {patterns!r}."
        )
    if not patterns:
        raise ValueError(f"{owner}: activation_modules is empty. Pass None to find them by structure.")


def find_activations(model: nn.Module, patterns: str | Sequence[str] | None) -> list[Activation]:
    """The activations of a model, in the order of its modules; names are those of the model without adapters.

    Raises:
        ValueError: there are none, or they belong to a mixture of experts.
        TypeError: `patterns` is no name, list of names, regular expression or None.
    """
    check_patterns(patterns, type(model).__name__)
    base = base_model(model)
    modules = [(name, module) for name, module in original_modules(base) if name]
    if patterns is None:
        found = _by_structure(base, modules)
    else:
        found = [(name, module) for name, module in modules if _matches(name, patterns)]
        if not found:
            leaves = [name for name, module in modules if _is_activation(module)]
            raise ValueError(
                f"activation_modules={patterns!r} matches no module of {type(base).__name__}. Pass the end of a name, "
                f"a list of such ends or a regular expression of whole names; its activation modules are {leaves[:6]}."
            )
    pair = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    return [Activation(name, module, _stack(name) if pair else "model") for name, module in found]


def _by_structure(base: nn.Module, modules: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    attentions = [name for name, module in modules if _is_attention(name, module)]
    blocks = []
    for name, module in modules:
        if isinstance(module, nn.ModuleList) and len(module):
            items = [f"{name}.{key}" for key, _ in module.named_children()]
            if all(any(is_below(key, item) for key in attentions) for item in items):
                blocks += items
    found = [
        (name, module)
        for name, module in modules
        if _is_activation(module)
        and any(is_below(name, block) for block in blocks)
        and not any(is_below(name, key) and any(is_below(key, block) for block in blocks) for key in attentions)
    ]
    parents = dict(modules)
    for name, _ in found:
        parent = parents.get(name.rpartition(".")[0])
        stacked = parent is not None and any(value.dim() == 3 for value in parent.parameters(recurse=False))
        if stacked or "expert" in name.lower():
            raise ValueError(
                f"activation_modules=None: {name} belongs to a mixture of experts, where each expert sees other tokens "
                "and no mask fits. Name the activations yourself and pass include_padding=True."
            )
    if not found:
        leaves = [name for name, module in modules if _is_activation(module)]
        hint = f" Its activation modules are {leaves[:6]}." if leaves else " It has no activation modules at all."
        raise ValueError(
            "activation_modules=None needs a model with a list of blocks, each with an attention and an activation "
            f"module beside it; {type(base).__name__} has none.{hint} Name those to count: activation_modules=[...]."
        )
    return found


def _is_attention(name: str, module: nn.Module) -> bool:
    # The attention itself, not a norm or a dropout called after it, nor a block or model class called after attention
    return named_attention(name, module) and bool(list(module.children())) and not isinstance(module, nn.ModuleList)


def _is_activation(module: nn.Module) -> bool:
    if list(module.children()):
        return False
    return type(module).__module__ in _HOMES or (
        not list(module.parameters()) and bool(_CLASS.search(type(module).__name__))
    )


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    if isinstance(patterns, str):
        return name == patterns or name.endswith(f".{patterns}") or re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _stack(name: str) -> str:
    for part in name.split("."):
        if part in ("encoder", "decoder"):
            return part
    return "encoder"
