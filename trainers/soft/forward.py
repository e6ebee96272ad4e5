"""The forward pass of a model with exits: their losses, in one pass of the backbone.

Notable: it happens inside the model's forward, where DDP and FSDP expect it. Hooks take the states of the layers, and
the tokens without a label are dropped. The rest goes through the model's own norm and head in `exit_losses` or
`kd_losses`, which hold no more than a chunk of logits.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from peft_dynamic.functional.exit_loss import IGNORED, exit_losses
from peft_dynamic.functional.kd_loss import Distillation, Head, kd_losses
from peft_dynamic.hosts.decoder import Decoder, find_decoder, layer_state
from peft_dynamic.hosts.deepspeed import gather_with
from peft_dynamic.hosts.offload import whole


@dataclass
class ExitOutput(ModelOutput):
    """What the model returns for `exits=[...]`, of E exits; the sums go over the labelled tokens.

    Attributes:
        loss: () the weighted sum of `nll`, with gradients.
        nll: (E,) the exits' summed losses.
        correct: (E,) how many tokens each exit finds likeliest.
        tokens: () how many tokens have a label.
        kd: (E,) the summed divergences from a teacher, where there is one.
        agree: (E,) how often an exit finds the teacher's likeliest token likeliest.
    """

    loss: torch.Tensor | None = None
    nll: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    kd: torch.Tensor | None = None
    agree: torch.Tensor | None = None


def add_exits(decoder: Decoder, outer: nn.Module) -> None:
    """Give the model's forward the arguments `exits`, `exit_weights`, `distillation`; without `exits` it is as before.

    `outer` is what is called in training: the model, or PEFT's around it, which calls its forward without hooks.
    """
    model = decoder.model
    before: Callable[..., Any] = model.forward

    # generate() and Trainer look at the signature. A deep copy of the model gets this method bound to the copy, while
    # `before`, TRL's, would run the original.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, exits: list[int] | None = None, **kwargs: Any) -> Any:
        original = self is model
        if exits is None:
            return before(*args, **kwargs) if original else type(self).forward(self, *args, **kwargs)
        if original:
            return _exit_forward(decoder, outer, args, kwargs, exits)
        return _exit_forward(find_decoder(self, least=1), self, args, kwargs, exits)

    model.forward = types.MethodType(forward, model)


def _exit_forward(
    decoder: Decoder, outer: nn.Module, args: tuple, kwargs: dict[str, Any], exits: list[int]
) -> ExitOutput:
    """One pass of the backbone and the losses of its exits, summed over the labelled tokens."""
    weights, labels = kwargs.pop("exit_weights"), kwargs.pop("labels")[:, 1:]
    how: Distillation | None = kwargs.pop("distillation", None)
    for name in ("output_hidden_states", "output_attentions", "return_dict"):  # PEFT passes them on, as None
        kwargs.pop(name, None)
    keep = labels != IGNORED
    states: dict[int, torch.Tensor] = {}

    def take(depth: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[depth] = layer_state(output)[:, :-1][keep]

        return hook

    handles = [decoder.layers[k - 1].register_forward_hook(take(k)) for k in exits if k < decoder.depth]
    try:
        last = decoder.backbone(*args, use_cache=False, **kwargs).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    hidden = [last[:, :-1][keep] if k == decoder.depth else decoder.finish(states[k]) for k in exits]
    head = decoder.head
    gather_with(outer, head.parameters(recurse=False))
    weight, bias = whole(head.weight), whole(head.bias)
    assert weight is not None
    rows, targets = torch.stack([state.to(weight.device) for state in hidden]), labels[keep].to(weight.device)
    tokens = keep.sum().to(weight.device)
    if how is None:
        losses = exit_losses(rows, targets, weight, bias, weights, decoder.logit_scale, decoder.softcap)
        return ExitOutput(losses.loss, losses.nll, losses.correct, tokens)
    own = Head(weight, bias, decoder.logit_scale, decoder.softcap)
    found = kd_losses(rows, targets, own, how, weights)
    return ExitOutput(found.loss, found.nll, found.correct, tokens, found.kd, found.agree)
