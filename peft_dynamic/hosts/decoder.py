"""Where a causal language model can be left: its decoder layers, the final norm and the head, found by structure.

An exit after layer n is `head(norm(output of layer n))` with the model's own norm and head, which is what a model cut
down to its first n layers computes. `find_decoder` says where these parts are or why the model has none that fit;
`check_decoder` runs a few tokens and compares, so that a part that we do not know of cannot go unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_dynamic.hosts.blocks import base_model
from peft_dynamic.hosts.quantization import is_quantized

_LAYERS = ("layers", "h", "blocks")
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "final_norm", "layer_norm")


@dataclass(frozen=True)
class Decoder:
    """The parts of a causal language model that its exits are made of.

    Modules are looked up when they are asked for: PEFT and FSDP replace them after the model was read.

    Attributes:
        model: the causal language model, below PEFT's wrappers.
        stack: the module that has the layers.
        layers_name, final_names: what `stack` calls the list of layers, and the modules between it and the head.
        logit_scale: factor of the head's output.
        softcap: c where the logits are c * tanh(z / c); None where they are z.
    """

    model: Any
    stack: nn.Module
    layers_name: str
    final_names: tuple[str, ...]
    logit_scale: float
    softcap: float | None

    @property
    def backbone(self) -> nn.Module:
        """The model without its head; its output is the last exit's state."""
        return self.model.base_model

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        layers = getattr(self.stack, self.layers_name)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def head(self) -> nn.Linear:
        """The head that is in use; with PEFT's `modules_to_save`, the active copy."""
        head = self.model.get_output_embeddings()
        if hasattr(head, "modules_to_save") and len(getattr(head, "active_adapters", ())) == 1:
            head = head.modules_to_save[head.active_adapters[0]] if not head.disable_adapters else head.original_module
        return head

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, and a projection after it where there is one: (..., D) of a layer to (..., D) of the head."""
        for name in self.final_names:
            hidden = getattr(self.stack, name)(hidden)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model says from the output of a layer, (..., D) to (..., V)."""
        hidden = self.finish(hidden)
        logits = self.head(hidden.to(self.head.weight.device)) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def find_decoder(model: nn.Module, least: int = 2) -> Decoder:
    """The layers, norm and head of a causal language model, with or without PEFT around it.

    Args:
        model: a transformers model with a language model head, or a `PeftModel` over one.
        least: how many layers it must have; one is enough where only the last state is asked for.

    Returns:
        The parts.

    Raises:
        ValueError: the architecture has none of them where we know to look; the message names it and the reason.
    """
    base = base_model(model)
    kind = type(base).__name__
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "get_decoder"):
        raise _refused(kind, "it is no transformers model with a language model head", "pass an AutoModelForCausalLM")
    if getattr(config, "is_encoder_decoder", False):
        raise _refused(kind, "it has an encoder beside its decoder", "pass a decoder-only model")
    text = config.get_text_config()
    stack = base.get_decoder()
    children = dict(stack.named_children())
    found = [name for name in _LAYERS if isinstance(children.get(name), nn.ModuleList)]
    if not found or stack is base:
        raise _refused(kind, f"its decoder, {type(stack).__name__}, has no list of layers called {_or(_LAYERS)}")
    layers = children[found[0]]
    if len(layers) < least:
        raise _refused(kind, "it has a single layer, so there is nothing to leave early", "pass a deeper model")
    norms = [name for name in _NORMS if children.get(name) is not None]
    if len(norms) > 1:
        raise _refused(kind, f"which of {_or(norms)} is the final norm is not known")
    # OPT's first models have no final norm, and the smallest of them a projection instead.
    if not norms and not hasattr(stack, "final_layer_norm"):
        raise _refused(kind, f"its decoder, {type(stack).__name__}, has no final norm called {_or(_NORMS)}")
    final = tuple(norms) + (("project_out",) if children.get("project_out") is not None else ())
    decoder = Decoder(base, stack, found[0], final, _logit_scale(text), getattr(text, "final_logit_softcapping", None))
    _check_head(decoder, kind)
    return decoder


@torch.no_grad()
def check_decoder(decoder: Decoder) -> None:
    """Run three tokens through the model and compare its logits with those of the last exit.

    Raises:
        ValueError: they differ, so the model does something between its layers and its logits that we do not know of.
    """
    states: list[torch.Tensor] = []
    handle = decoder.layers[-1].register_forward_hook(lambda _, args, output: states.append(layer_state(output)))
    device = decoder.model.get_input_embeddings().weight.device
    kind = type(decoder.model).__name__
    try:
        with torch.random.fork_rng():  # dropout must not change the draws of the training to come
            ids = torch.arange(3, device=device)[None]
            logits = decoder.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        handle.remove()
    if len(states) != 1 or states[0].dim() != 3:
        raise _refused(kind, "its last layer does not run once with one state per token")
    own = decoder.logits(states[0]).to(logits.device)
    if own.shape != logits.shape or (own.float() - logits.float()).abs().max() > 0.02 * logits.float().abs().max():
        raise _refused(kind, "its logits are not head(norm(output of the last layer))")


def layer_state(output: Any) -> torch.Tensor:
    """The (batch, tokens, D) state in what a decoder layer returns."""
    state = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(state, torch.Tensor)
    return state


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling


def _check_head(decoder: Decoder, kind: str) -> None:
    head: Any = decoder.head
    name = type(head).__name__
    if head is None:
        raise _refused(kind, "it has no language model head", "pass an AutoModelForCausalLM")
    if not isinstance(head, nn.Linear) or hasattr(head, "base_layer"):
        raise _refused(
            kind,
            f"its head is a {name}; the exits multiply by the head's weight, so an adapter on it would not be trained",
            "keep it out of target_modules and trainable_token_indices (modules_to_save=['lm_head'] trains it)",
        )
    if is_quantized(head):
        raise _refused(kind, f"its head is quantised ({name})", "leave the head out: llm_int8_skip_modules=['lm_head']")


def _or(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


def _refused(kind: str, reason: str, fix: str | None = None) -> ValueError:
    fix = fix or "the families that work are listed in docs/soft.md"
    return ValueError(f"{kind} cannot be left at an earlier layer: {reason}. The way out: {fix}.")
