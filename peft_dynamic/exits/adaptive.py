"""Instance-aware decoding: each token leaves the model at the first exit that is sure enough of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peft_dynamic.exits.layers import check_exit, depth_of
from peft_dynamic.exits.prompts import check_generation_config, prepared
from peft_dynamic.exits.sections import in_sections
from peft_dynamic.hosts.blocks import base_model
from peft_dynamic.hosts.modes import evaluating

# The paper's, for the layers 12, 16, ..., 36 of 40.
PAPER_THRESHOLDS = {0.3: 0.95, 0.4: 0.95, 0.5: 0.9, 0.6: 0.9, 0.7: 0.8, 0.8: 0.8, 0.9: 0.7}


@dataclass(frozen=True)
class AdaptiveOutput:
    """What `generate_adaptive` returns.

    Attributes:
        sequences: (B, T + N) prompts and new tokens, padded after the end of a sequence.
        exits: (B, N) the layer after which each new token left the model; 0 where a sequence has ended.
    """

    sequences: torch.Tensor
    exits: torch.Tensor

    @property
    def mean_exit(self) -> float:
        """Mean over the tokens of the layer after which they left; layers that were filled in later do not count."""
        return self.exits[self.exits > 0].double().mean().item()


def paper_thresholds(model: Any) -> dict[int, float]:
    """The paper's thresholds for those of its exits that this model has.

    The paper's exits are after 12, 16, ..., 36 of 40 layers. An exit of another model has a threshold here if it is
    the same fraction of its depth.

    Args:
        model: a causal language model of transformers, or a `PeftModel` over one.

    Returns:
        Layer -> threshold, without the last layer.

    Raises:
        ValueError: none of the fractions falls on a layer.

    Source: P. Kavehzadeh et al., Sorted LLaMA, 2024, arXiv 2309.08968, section on instance-aware inference.
    """
    depth = depth_of(model)
    found = {
        round(fraction * depth): p
        for fraction, p in PAPER_THRESHOLDS.items()
        if math.isclose(fraction * depth, round(fraction * depth), abs_tol=1e-6) and round(fraction * depth)
    }
    if not found:
        raise ValueError(
            f"thresholds='paper': none of the paper's depths (0.3, 0.4, ..., 0.9) falls on one of {depth} layers. Pass "
            "a dict from exits to thresholds, for example what calibrate_thresholds returns."
        )
    return found


def generate_adaptive(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    thresholds: Mapping[int, float] | str,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    logits_processor: Any = None,
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> AdaptiveOutput:
    """Generate, each token from the first exit whose largest probability reaches its threshold.

    At exit e with logits z_e a token is taken if max softmax(z_e) >= thresholds[e]; if no exit is sure, the last layer
    decides. The paper leaves open what the cache holds for layers that a token skipped. Here it holds what they would
    have computed: the state at the exit is kept, and when a later token goes deeper, the skipped layers first catch
    up on all tokens that wait in front of them, the prompt's too. So each token is the one that a model without any
    cache would give under the same rule.

    The rows of a batch step together: a step goes as deep as the row that is least sure, and the others' cache is
    filled along the way; a row's tokens and exits do not depend on the other rows.

    Args:
        model: a causal language model of transformers, or a `PeftModel` over one. It runs in eval mode.
        input_ids: (B, T) prompts, padded on the left.
        attention_mask: (B, T), 0 where a prompt is padded; None without padding.
        thresholds: exit -> probability; above 1 the exit is never taken and costs nothing. "paper" for
            `paper_thresholds(model)`.
        max_new_tokens: at most so many tokens.
        do_sample: draw from the exit's distribution; otherwise take its most likely token. Of the model's generation
            config only the tokens that end and pad are used; without a `logits_processor` others that would change the
            text, a repetition_penalty say, are refused.
        logits_processor: transformers' `LogitsProcessorList`, applied to the logits of the exit that is taken. The
            confidence is that of the logits before it.
        generator: for the draws.
        eos_token_id: tokens that end a sequence; None for those of the generation config, [] for none.
        pad_token_id: what follows the end in a batch; None for that of the generation config.

    Returns:
        The tokens and their exits.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a threshold or an exit that cannot be, prompts that are not padded on the left, an architecture
            that cannot be left early, or an adapter that is a trained prompt.

    Source: P. Kavehzadeh et al., Sorted LLaMA, 2024, arXiv 2309.08968.
    """
    limits = paper_thresholds(model) if thresholds == "paper" else _checked(model, thresholds)
    if logits_processor is None:
        check_generation_config(
            base_model(model).generation_config,
            "Pass it as a logits_processor, or set it to None on model.generation_config.",
        )
    prompts = prepared(model, input_ids, attention_mask, max_new_tokens, eos_token_id, pad_token_id)
    ends = [*sorted(exit for exit, limit in limits.items() if limit <= 1), depth_of(model)]
    rows = len(prompts.ids)
    finished = torch.zeros(rows, dtype=torch.bool, device=prompts.ids.device)
    exits: list[torch.Tensor] = []
    with evaluating(model), in_sections(model, ends, prompts.ids, prompts.mask) as sections:
        for _ in range(max_new_tokens):
            undecided = ~finished
            token = torch.full((rows,), prompts.pad, device=finished.device)
            left = torch.zeros_like(token)
            for number, end in enumerate(ends):
                logits = sections.run(number)[:, -1].float().to(token.device)
                largest, likeliest = logits.max(-1)
                if end == ends[-1]:
                    sure = undecided
                else:
                    sure = undecided & ((largest - logits.logsumexp(-1)).exp() >= limits[end])
                if logits_processor is not None or do_sample:
                    likeliest = _chosen(sections.ids, logits, logits_processor, do_sample, generator)
                token = torch.where(sure, likeliest, token)
                left.masked_fill_(sure, end)
                undecided = undecided & ~sure
                if not undecided.any():
                    break
            sections.append(token)
            exits.append(left)
            finished = finished | prompts.ends(token)
            if finished.all():
                break
    return AdaptiveOutput(sections.ids, torch.stack(exits, dim=1))


def _chosen(
    ids: torch.Tensor, logits: torch.Tensor, processor: Any, do_sample: bool, generator: torch.Generator | None
) -> torch.Tensor:
    scores = logits if processor is None else processor(ids, logits)
    if do_sample:
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
    return scores.argmax(-1)


def _checked(model: Any, thresholds: Any) -> dict[int, float]:
    if not isinstance(thresholds, Mapping):
        raise TypeError(f"thresholds={thresholds!r}: must be a dict from exits to probabilities, or 'paper'.")
    depth = depth_of(model)
    for exit, limit in thresholds.items():
        check_exit(model, exit, "thresholds: exit")
        if exit == depth:
            raise ValueError(f"thresholds: exit {exit} is the last layer, which takes every token. Leave it out.")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 0:
            raise ValueError(f"thresholds[{exit}]={limit!r}: must be a probability; above 1 means never.")
    return dict(thresholds)
