"""Watches a model's activations during its forward passes, with the padding mask that belongs to each.

Notable: the hooks sit on the activations, which checkpointing runs again in the backward pass, and on the model, its
PEFT wrappers and its backbone. The outermost of these opens and closes a pass, so any of them may be the one that a
loop, a trainer or a fused head calls. The mask is taken from the innermost call, where virtual tokens are in it.
torch.compile leaves the hooks out: the graph breaks at each, and the parts between them are compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from peft_dynamic.density.structure import Activation, find_activations
from peft_dynamic.functional.density import token_weights
from peft_dynamic.hosts.autograd import in_backward as in_backward  # was here before
from peft_dynamic.hosts.autograd import in_reentrant_checkpoint as in_reentrant_checkpoint  # likewise
from peft_dynamic.hosts.blocks import base_model
from peft_dynamic.hosts.running import call_frame, is_running

_READ = ("attention_mask", "decoder_attention_mask", "labels", "decoder_input_ids", "past_key_values")


class Pass:
    """One forward pass: who opened it, the arguments that say what is padding, and what was collected."""

    def __init__(self, opener: nn.Module, pad: int | None) -> None:
        self.opener, self.pad, self.call = opener, pad, call_frame()
        self.inputs: dict[str, Any] = {}
        self.collected: dict[str, list[Any]] = {}
        self.rows = 0
        self._weights: dict[tuple, torch.Tensor] = {}

    def read(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take over the arguments of a further call inside the pass; a mask of two dimensions is never given up."""
        named = dict(kwargs)
        if args:
            try:
                bound = inspect.signature(module.forward).bind_partial(*args)
            except TypeError:
                bound = None
            named |= bound.arguments if bound is not None else {}
        for key in _READ:
            value = named.get(key)
            if value is None or (key in self.inputs and getattr(value, "dim", lambda: 2)() != 2):
                continue
            self.inputs[key] = value

    def mask(self, stack: str) -> torch.Tensor | None:
        """(batch, tokens), 0 at padding; None where every token is real."""
        inputs = self.inputs
        if stack != "decoder":
            return inputs.get("attention_mask")
        if "decoder_attention_mask" in inputs:
            return inputs["decoder_attention_mask"]
        if "labels" in inputs:
            return inputs["labels"] != -100
        ids = inputs.get("decoder_input_ids")
        if ids is None or self.pad is None:
            return None
        real = ids != self.pad
        real[:, 0] = True  # the start token, which is the padding token in T5
        return real

    def fit(self, a: torch.Tensor, layer: Activation) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The activations as (batch, tokens, neurons) with a mask (batch, tokens), or as they are with None.

        Raises:
            ValueError: the mask does not fit.
        """
        mask = self.mask(layer.stack)
        if mask is None:
            return a, None
        if mask.dim() == 2:
            if a.dim() == 3 and a.shape[1] < mask.shape[1] and "past_key_values" in self.inputs:
                mask = mask[:, -a.shape[1] :]  # the columns before are the cache's, or prefix tuning's
            if a.shape[:-1].numel() == mask.numel():
                return a.reshape(*mask.shape, a.shape[-1]), mask
        raise ValueError(
            f"the {'decoder ' if layer.stack == 'decoder' else ''}mask of shape {tuple(mask.shape)} does not fit the "
            f"activations of {layer.name}, {tuple(a.shape)}: the rule is (batch, tokens) and (batch, tokens, neurons). "
            "Pass a mask of that shape to the model, or count padding too: include_padding=True."
        )

    def weights(self, a: torch.Tensor, layer: Activation) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`fit`, with the token weights of equation (4) in place of the mask."""
        a, mask = self.fit(a, layer)
        if mask is None:
            return a, None
        key = (layer.stack, tuple(mask.shape))
        if key not in self._weights:
            self._weights[key] = token_weights(mask)
        return a, self._weights[key]


class Collector:
    """Hooks on a model that call back for each activation, and at the end of each outermost forward pass.

    Args:
        model: any model, with or without PEFT.
        activation_modules: as in `find_activations`.
        begin: `begin(module)` says whether a pass that this module opens is watched.
        on_activation: `on_activation(layer, module, args, output, pass or None)`; None outside of a watched pass.
        on_end: `on_end(pass, output)` returns the output to go on with, or None for the same.
    """

    def __init__(
        self,
        model: nn.Module,
        activation_modules: str | Sequence[str] | None,
        begin: Callable[[nn.Module], bool],
        on_activation: Callable[..., None],
        on_end: Callable[[Pass, Any], Any],
    ) -> None:
        self.layers = find_activations(model, activation_modules)
        self.current: Pass | None = None
        self._begin, self._on_activation, self._on_end = begin, on_activation, on_end
        self._by_module = {layer.module: layer for layer in self.layers}
        config = getattr(base_model(model), "config", None)
        self._pad: int | None = getattr(config, "pad_token_id", None)
        self._handles = [layer.module.register_forward_hook(self._activation) for layer in self.layers]
        for root in roots(model):
            self._handles.append(root.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(root.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.current is not None and not is_running(self.current.call):
            self.current = None  # it was interrupted, which no hook is told of
        if self.current is None and self._begin(module):
            self.current = Pass(module, self._pad)
        if self.current is not None:
            self.current.read(module, args, kwargs)

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        done = self.current
        if done is None or done.opener is not module:
            return None
        self.current = None
        if output is None:  # an error is on its way up
            return None
        return self._on_end(done, output)

    @torch.compiler.disable
    def _activation(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self._on_activation(self._by_module[module], module, args, output, self.current)


def roots(model: nn.Module) -> list[nn.Module]:
    """The modules any of which a loop, a trainer or `generate` may call: PEFT's wrappers, the model, its backbone."""
    base = base_model(model)
    candidates = [model, getattr(model, "base_model", None), base, getattr(base, "base_model", None)]
    unique: dict[int, nn.Module] = {id(item): item for item in candidates if isinstance(item, nn.Module)}
    return list(unique.values())
