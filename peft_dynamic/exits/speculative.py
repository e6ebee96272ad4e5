"""Self-speculative decoding: the first layers draft a few tokens, the others check them all at once.

Drafting and checking share one cache and one set of states: the check starts from the states that the drafts have at
the exit and runs the deeper layers alone. transformers' `assistant_early_exit` drafts with a cache of its own and
checks with the whole model, for one sequence at a time; `assisted_exit` makes that safe to use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from peft_dynamic.exits.layers import check_exit, depth_of
from peft_dynamic.exits.prompts import check_generation_config, prepared
from peft_dynamic.exits.sections import in_sections
from peft_dynamic.hosts.blocks import base_model
from peft_dynamic.hosts.decoder import find_decoder
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.hosts.probe import trial


@dataclass(frozen=True)
class SpeculativeOutput:
    """What `generate_speculative` returns.

    Attributes:
        sequences: (B, T + N) prompts and new tokens, padded after the end of a sequence.
        drafted: how many tokens the first layers proposed.
        accepted: how many of them the whole model would have chosen too.
        checks: how often the deeper layers ran.
    """

    sequences: torch.Tensor
    drafted: int
    accepted: int
    checks: int

    @property
    def acceptance(self) -> float:
        """Accepted over drafted."""
        return self.accepted / self.drafted


def generate_speculative(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    exit: int,
    max_new_tokens: int = 64,
    draft_tokens: int = 4,
    draft_confidence: float = 0.4,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> SpeculativeOutput:
    """Generate what greedy decoding of the whole model generates, drafted by its first layers.

    The model up to `exit` drafts K tokens, one after another. Then the deeper layers run once over the states that
    these have at the exit. Drafts are kept up to the first that differs from the whole model's choice, which takes its
    place. K begins at `draft_tokens`, grows by 2 when all drafts were kept and shrinks by 1 otherwise, as in
    transformers; a draft ends early at a token of which the exit is unsure.

    In a batch each row keeps its own number of drafts. The rows that keep fewer move to the right in the cache and are
    padded on the left.

    The tokens are those of greedy decoding up to rounding: several tokens at once are not summed in the same order as
    one, so where two tokens are equally likely to the last bits, the other one may be chosen.

    Args:
        model: a causal language model of transformers, or a `PeftModel` over one. It runs in eval mode.
        input_ids: (B, T) prompts, padded on the left.
        attention_mask: (B, T), 0 where a prompt is padded; None without padding.
        exit: the layer after which the drafts leave the model, below the last.
        max_new_tokens: at most so many tokens.
        draft_tokens: K at the start.
        draft_confidence: a draft ends when every row has had a token whose probability was below this; 0 for never.
        eos_token_id: tokens that end a sequence; None for those of the generation config, [] for none.
        pad_token_id: what follows the end in a batch; None for that of the generation config.

    Returns:
        The tokens and how many drafts were accepted.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an exit or a number that cannot be, prompts that are not padded on the left, an architecture that
            cannot be left early, or an adapter that is a trained prompt.

    Source: J. Zhang et al., Draft & Verify, 2023, arXiv 2309.08168; P. Kavehzadeh et al., Sorted LLaMA, 2024, arXiv
        2309.08968, who use it on SoFT's exits.
    """
    _check_draft(model, exit, draft_tokens, draft_confidence)
    check_generation_config(
        base_model(model).generation_config,
        "Set it to None on model.generation_config for plain greedy text, or use generate under assisted_exit.",
    )
    prompts = prepared(model, input_ids, attention_mask, max_new_tokens, eos_token_id, pad_token_id)
    rows = len(prompts.ids)
    texts: list[list[int]] = [[] for _ in range(rows)]
    live = [True] * rows
    drafted = accepted = checks = 0
    ends = set(prompts.eos.tolist())
    with evaluating(model), in_sections(model, [exit, depth_of(model)], prompts.ids, prompts.mask) as sections:
        while any(live):
            missing = max(max_new_tokens - len(text) for text, on in zip(texts, live, strict=True) if on)
            drafts = _draft(sections, min(draft_tokens, missing), draft_confidence, live)
            count = drafts.shape[1]
            choices = sections.run(1, keep=count).argmax(-1).to(drafts.device)
            agreed = (choices == drafts).long().cumprod(1).sum(1).tolist()
            # Of K drafts the state of the last was never computed, so all of them kept means K tokens and not K + 1.
            kept = [min(agree + 1, count) for agree in agreed]
            most = max(keep for keep, on in zip(kept, live, strict=True) if on)
            kept = [keep if on else most for keep, on in zip(kept, live, strict=True)]
            sections.take_back(kept, count)
            sections.append(choices.gather(1, choices.new_tensor(kept)[:, None] - 1)[:, 0])
            checks += 1
            everything = all(agree == count for agree, on in zip(agreed, live, strict=True) if on)
            draft_tokens = draft_tokens + 2 if everything else max(1, draft_tokens - 1)
            for row, new in enumerate(choices.tolist()):
                if live[row]:
                    drafted, accepted = drafted + count, accepted + agreed[row]
                    for token in new[: kept[row]]:
                        texts[row].append(token)
                        if token in ends or len(texts[row]) == max_new_tokens:
                            live[row] = False
                            break
    longest = max(map(len, texts))
    new_tokens = [text + [prompts.pad] * (longest - len(text)) for text in texts]
    sequences = torch.cat([prompts.ids, prompts.ids.new_tensor(new_tokens)], dim=1)
    return SpeculativeOutput(sequences, drafted, accepted, checks)


def _draft(sections: Any, wanted: int, confidence: float, live: list[bool]) -> torch.Tensor:
    """Up to `wanted` tokens of the first section, (B, K); the last of them is not among the sections' tokens."""
    drafts: list[torch.Tensor] = []
    sure = torch.tensor(live, device=sections.ids.device)
    while True:
        logits = sections.run(0)[:, -1].float().to(sections.ids.device)
        largest, token = logits.max(-1)
        drafts.append(token)
        if confidence and len(drafts) < wanted:
            sure = sure & ((largest - logits.logsumexp(-1)).exp() >= confidence)
        if len(drafts) == wanted or not sure.any():
            return torch.stack(drafts, dim=1)
        sections.append(token)


@contextmanager
def assisted_exit(model: Any, exit: int, draft_tokens: int = 4) -> Iterator[dict[str, int]]:
    """A block in which transformers' own self-speculative decoding is safe to use.

    `with assisted_exit(model, 12) as how: model.generate(**inputs, **how)` drafts with 12 layers, samples too if
    asked, and takes all of `generate`'s settings; for one sequence at a time. Afterwards, also after an error, the
    configuration is what it was.

    Args:
        model: a causal language model of transformers, or a `PeftModel` over one.
        exit: the layer after which the drafts leave the model, below the last.
        draft_tokens: how many tokens are drafted at first; transformers' own default is 20.

    Yields:
        The arguments for `generate`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is no such exit, or the architecture does not run fewer layers when its configuration says so;
            nothing was changed then.
    """
    _check_draft(model, exit, draft_tokens, 0)
    base = base_model(model)
    config = base.config.get_text_config(decoder=True)
    layers = config.num_hidden_layers
    decoder = find_decoder(model)
    settings = base.generation_config
    before = (settings.num_assistant_tokens, settings.num_assistant_tokens_schedule)
    try:
        config.num_hidden_layers = exit
        try:
            with evaluating(base):
                ran, _, _ = trial(decoder)
        except IndexError:
            ran = []
        if ran != list(range(exit)):
            raise ValueError(
                f"{type(base).__name__} does not run {exit} layers when its configuration says so, which "
                "assistant_early_exit relies on. Use generate_speculative in its place."
            )
        config.num_hidden_layers = layers
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = draft_tokens, "heuristic"
        yield {"assistant_early_exit": exit}
    finally:
        config.num_hidden_layers = layers
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = before


def _check_draft(model: Any, exit: int, draft_tokens: Any, draft_confidence: Any) -> None:
    check_exit(model, exit)
    if exit == depth_of(model):
        raise ValueError(f"exit={exit} is the last layer: there would be nothing left to check the drafts with.")
    if isinstance(draft_tokens, bool) or not isinstance(draft_tokens, int) or draft_tokens < 1:
        raise ValueError(f"draft_tokens={draft_tokens!r}: must be a whole number of at least 1.")
    number = isinstance(draft_confidence, int | float) and not isinstance(draft_confidence, bool)
    if not number or not 0 <= draft_confidence <= 1:
        raise ValueError(f"draft_confidence={draft_confidence!r}: must be a probability; 0 means to draft on.")
