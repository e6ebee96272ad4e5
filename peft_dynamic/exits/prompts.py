"""What both ways of decoding make of a user's prompts before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from peft_dynamic.hosts.blocks import base_model


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


# Fields of a generation config that change nothing in greedy decoding of one sequence a prompt, or that are read here.
_WITHOUT_EFFECT = {
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "early_stopping", "length_penalty", "num_return_sequences", "use_cache"),
    *("cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache", "prefill_chunk_size"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *(
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        "transformers_version",
        "compile_config",
    ),
    *("disable_compile", "low_memory", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "speculative_decoding_type", "_from_model_config"),
    *("renormalize_logits", "continuous_batching_config"),
}
# What means nothing beside None, False, 0 and an empty list.
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "guidance_scale": 1.0,
    "encoder_no_repeat_ngram_size": 0,
}


def check_generation_config(config: Any, instead: str) -> None:
    """Refuse a generation config that would change the text, and that is not applied here.

    Args:
        config: the model's; a field that a newer transformers has and that is not known here counts too.
        instead: what to do, for the message.

    Raises:
        ValueError: it has such a field.
    """
    default = GenerationConfig().to_dict()
    for name, value in config.to_dict().items():
        known = name in _WITHOUT_EFFECT or value in (None, False, 0, [], {}) or value == default.get(name)
        if not known and _NEUTRAL.get(name) != value:
            raise ValueError(
                f"the model's generation config has {name}={value!r}, which is not applied here, so the text would be "
                f"another than generate's. {instead}"
            )


def _begins_with_padding(ids: torch.Tensor, pad: int, bos: Any) -> bool:
    """Whether a prompt begins with padding: one padding token in front of each may be the beginning of a text too."""
    begins = ids[:, 0] == pad
    one_for_each = pad == bos and bool(begins.all()) and not bool((ids[:, 1:2] == pad).any())
    return bool(begins.any()) and not one_for_each


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
        if pad is not None and _begins_with_padding(input_ids, pad, config.bos_token_id):
            raise ValueError(
                f"attention_mask=None: the prompts begin with padding (token {pad}), which would be read as text; pass "
                "attention_mask, the tokenizer's, or torch.ones_like(input_ids) where it is text."
            )
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
