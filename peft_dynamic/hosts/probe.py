"""Running three tokens, and comparing: what we believe of an architecture is tried before anything rests on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_dynamic.hosts.decoder import Decoder, layer_state

_CLOSE = 0.02  # of the largest logit: far above bfloat16's rounding, far below the effect of a layer


def trial(decoder: Decoder) -> tuple[list[int], dict[int, torch.Tensor], torch.Tensor]:
    """Run three tokens: which layers ran, their outputs, and the logits."""
    ran: list[int] = []
    states: dict[int, torch.Tensor] = {}

    def note(number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            ran.append(number)
            states[number] = layer_state(output)

        return hook

    handles = [
        layer.register_forward_hook(note(number)) for number, layer in enumerate(decoder.layers._modules.values())
    ]
    try:
        logits = trial_logits(decoder.model)
    finally:
        for handle in handles:
            handle.remove()
    return ran, states, logits


def trial_logits(model: Any) -> torch.Tensor:
    """(1, 3, V) logits of three tokens."""
    ids = torch.arange(3, device=model.get_input_embeddings().weight.device)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two sets of logits are the same up to the rounding of short floats."""
    one, other = one.float(), other.float().to(one.device)
    return one.shape == other.shape and bool((one - other).abs().max() <= _CLOSE * other.abs().max())
