"""A causal teacher's states at the labelled positions, and the head that turns them into logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_dynamic.functional.kd_loss import Head, States
from peft_dynamic.hosts.decoder import Decoder, check_decoder, find_decoder
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.hosts.offload import whole

__all__ = ["Decoder", "decoder_states", "found_decoder"]


def found_decoder(model: Any) -> Decoder:
    """The decoder of a causal model, once its last state and head are seen to give its logits.

    Raises:
        ValueError: they do not.
    """
    decoder = find_decoder(model, least=1)
    with evaluating(model):
        check_decoder(decoder)
    return decoder


def decoder_states(decoder: Decoder, inputs: Mapping[str, torch.Tensor], keep: torch.Tensor) -> States:
    """The states of the kept positions, (N, D), and the head that goes with them."""
    known = {name: value for name, value in inputs.items() if name != "use_cache"}
    hidden = decoder.backbone(**known, use_cache=False).last_hidden_state
    weight = whole(decoder.head.weight)
    assert weight is not None
    head = Head(weight, whole(decoder.head.bias), decoder.logit_scale, decoder.softcap)
    return States(hidden[:, :-1][keep.to(hidden.device)], head)
