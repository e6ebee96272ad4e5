"""What both ways of decoding make of a user's prompts before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peft_dynamic.trainers.soft.structure import base_model


@dataclass(frozen=True)
class Prompts:
    """Checked prompts.

    Attributes:
        ids: (B, T), padded on the left.
        mask: (B, T); None if nothing is padded.
        eos: tokens that end a sequence.
        pad: what follows the end in a batch.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    eos: torch.Tensor
    pad: int

    def ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of the tokens, of any shape, end their sequence."""
        return torch.isin(tokens, self.eos)


def prepared(
    model: Any,
    input_ids: Any,
    attention_mask: Any,
    max_new_tokens: Any,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
) -> Prompts:
    """The prompts, with what is not given taken from the model's generation config.

    Raises:
        TypeError: an argument is of another type.
        ValueError: shapes that do not fit, prompts that are empty or not padded on the left, or nothing to generate.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.long, torch.int):
        raise TypeError(f"input_ids={type(input_ids).__name__}: must be a (B, T) tensor of token ids.")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids: shape {tuple(input_ids.shape)}; must be (B, T) with at least one token each.")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r}: must be a whole number of at least 1.")
    base = base_model(model)
    config = base.generation_config
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    if attention_mask is None:
        if pad is not None and pad not in ends and bool((input_ids[:, 0] == pad).any()):
            raise ValueError("attention_mask=None: the prompts begin with padding; pass attention_mask.")
    else:
        if tuple(attention_mask.shape) != tuple(input_ids.shape):
            raise ValueError(
                f"attention_mask: shape {tuple(attention_mask.shape)}; must be that of input_ids, "
                f"{tuple(input_ids.shape)}."
            )
        attention_mask = attention_mask.to(input_ids.device, torch.long)
        if bool((attention_mask.diff(dim=1) < 0).any()) or not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask: the prompts must be padded on the left: tokenizer.padding_side='left'.")
        if bool(attention_mask.all()):
            attention_mask = None
    if pad is None:
        pad = ends[0] if ends else 0
    device = base.get_input_embeddings().weight.device
    mask = None if attention_mask is None else attention_mask.to(device)
    return Prompts(input_ids.to(device), mask, torch.tensor(ends, dtype=torch.long, device=device), pad)
