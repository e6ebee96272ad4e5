"""Optimizers of PEFT that read what LoRA stores: refused before their first step where ours mean it otherwise."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from peft_dynamic.tuners.factors import LayerState, live_states

_checked: WeakSet[torch.optim.Optimizer] = WeakSet()


def _held(optimizer: torch.optim.Optimizer) -> list[LayerState]:
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [views for views in live_states() if any(id(factor) in parameters for factor in views.stored())]


def _is_loraplus(groups: list[dict[str, Any]]) -> bool:
    """Whether `create_loraplus_optimizer` made these groups: A, embeddings, B, and B without decay."""
    return (
        len(groups) == 4
        and groups[2].get("lr") == groups[3].get("lr") != groups[0].get("lr")
        and groups[3].get("weight_decay") == 0
    )


def _check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before each optimizer's first step.

    Raises:
        RuntimeError: it would do something else with the factors than with LoRA's.
    """
    if optimizer in _checked:
        return
    _checked.add(optimizer)
    of_peft = type(optimizer).__module__.startswith("peft.")
    if not of_peft and not _is_loraplus(optimizer.param_groups):
        return
    for views in _held(optimizer):
        if of_peft and not views.is_stock:
            raise RuntimeError(
                f"{type(optimizer).__name__} of PEFT computes with the stored lora_A and lora_B, and this adapter "
                "computes with a cut, mixed or factorised form of them. Use AdamW, or another optimizer that treats "
                "each parameter by itself. Nothing has been updated."
            )
        if not of_peft and views.stores_vectors:
            raise RuntimeError(
                "create_loraplus_optimizer takes every parameter of one dimension for a part of B, and LoRETTA_rep "
                "stores both factors so. Make the groups yourself: the names with 'lora_A' at lr, those with 'lora_B' "
                "at lr * ratio. Nothing has been updated."
            )


register_optimizer_step_pre_hook(_check)
