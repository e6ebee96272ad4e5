"""Completions of prompts: tokenised, generated, and where each of them ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)


@dataclass
class Completions:
    """Prompts with what was generated for them.

    Attributes:
        ids: (batch, tokens) prompt and completion side by side, right-padded.
        prompt_lengths: (batch,) int.
        lengths: (batch,) int, the tokens of each completion, with the one that ended it.
        ended: (batch,) bool, False where a completion was cut off.
        sampled: (batch, width) log-probabilities by whatever sampled the tokens, NaN where it gave none; or None.
        fields: further arguments of the reward functions, one value for each completion.
    """

    ids: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor
    sampled: torch.Tensor | None = None
    fields: dict[str, list[Any]] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What scoring needs, one row for each completion."""
        return {"ids": self.ids, "prompt_lengths": self.prompt_lengths, "lengths": self.lengths}

    def completion_ids(self) -> list[list[int]]:
        return [
            row[prompt : prompt + length]
            for row, prompt, length in zip(
                self.ids.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True
            )
        ]


class Ends(StoppingCriteria):
    """Ends completions at certain tokens or texts, and keeps where.

    This is the only place that decides where a completion ends, and it does so when the token is sampled. Nothing is
    found out later by looking for EOS or padding, which may be the same token.
    """

    def __init__(
        self, rows: int, prompt_width: int, ids: Sequence[int], strings: Sequence[str], tokenizer: Any, device: Any
    ) -> None:
        self.prompt_width, self.strings, self.tokenizer = prompt_width, list(strings), tokenizer
        self.ids = torch.tensor(list(ids), dtype=torch.long, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(rows,) bool, which completions are over."""
        now = torch.isin(input_ids[:, -1], self.ids)
        if self.strings:
            going = (~self.ended).nonzero()[:, 0].tolist()
            texts = self.tokenizer.batch_decode(input_ids[going, self.prompt_width :])
            for row, text in zip(going, texts, strict=True):
                now[row] |= any(string in text for string in self.strings)
        self.lengths += ~self.ended
        self.ended |= now
        return self.ended


class Draw(LogitsProcessor):
    """Draws the next token from the whole softmax at one temperature, and leaves it as the only one that is possible.

    By inverting the distribution function with one random number per row. `torch.multinomial` takes one for each token
    of the vocabulary, which on a CPU was a tenth of a whole rollout with its update.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) logits to 0 for the drawn token and -inf for all others."""
        logits = scores.float() / self.temperature
        below = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_().cumsum(dim=-1, dtype=torch.float64)
        place = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device) * below[:, -1:]
        drawn = torch.searchsorted(below, place, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class Generator:
    """Generates completions with exactly the distribution that is scored: the whole vocabulary, at one temperature.

    Args:
        tokenizer: of the policy.
        stop_ids: tokens that end a completion.
        stop_strings: texts that do.
        max_length: the most tokens of a completion.
        temperature: of the policy.
        context: the most tokens that the model takes, or None.
        equal_lengths: generate together only for prompts of the same length. For adapters with virtual tokens: padding
            between these and a prompt would move them apart.
        chat_template_kwargs: for prompts that are conversations.

    Attributes:
        synced: several processes hold the policy in parts, so that each takes part as long as one of them generates.
    """

    synced = False

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Sequence[int],
        stop_strings: Sequence[str],
        max_length: int,
        temperature: float,
        context: int | None,
        equal_lengths: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.stop_ids, self.stop_strings = tokenizer, list(stop_ids), list(stop_strings)
        self.max_length, self.temperature, self.context = max_length, temperature, context
        self.equal_lengths = equal_lengths
        self.chat_template_kwargs = chat_template_kwargs or {}

    @property
    def can_end(self) -> bool:
        """Whether a completion can end before `max_length`; where none can, the full length is the end."""
        return bool(self.stop_ids or self.stop_strings)

    def tokenize(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Token ids of texts or conversations; one that ends with the assistant's words is to be continued.

        Raises:
            ValueError: a prompt is empty, or leaves no room for its completion.
        """
        found = []
        for prompt in prompts:
            if isinstance(prompt, str):
                ids = self.tokenizer(prompt)["input_ids"]
            else:
                goes_on = bool(prompt) and prompt[-1]["role"] == "assistant"
                ids = self.tokenizer.apply_chat_template(
                    prompt,
                    add_generation_prompt=not goes_on,
                    continue_final_message=goes_on,
                    return_dict=True,
                    **self.chat_template_kwargs,
                )["input_ids"]
            if not ids:
                raise ValueError(f"The prompt {prompt!r} has no tokens; give the model at least one to start from.")
            if self.context is not None and len(ids) + self.max_length > self.context:
                raise ValueError(
                    f"A prompt of {len(ids)} tokens and max_completion_length={self.max_length} do not fit in the "
                    f"model's {self.context} positions. Shorten or drop such prompts, or lower max_completion_length. "
                    f"The prompt: {str(prompt)[:200]!r}"
                )
            found.append(ids)
        return found

    def end_of(self, ids: list[int]) -> tuple[int, bool]:
        """Where `Ends` would have ended tokens that something else has generated: their number, and whether it did."""
        texts = self.tokenizer.batch_decode([ids[:n] for n in range(1, len(ids) + 1)]) if self.stop_strings else ids
        for n, (token, text) in enumerate(zip(ids, texts, strict=True), 1):
            if token in self.stop_ids or any(string in text for string in self.stop_strings):
                return n, True
        return len(ids), False

    @torch.no_grad()
    def __call__(self, model: Any, policy: Any, prompts: list[list[int]], sample: bool, size: int) -> Completions:
        """Generate one completion for each prompt, `size` at a time.

        Args:
            model: the policy with its adapter, in evaluation mode.
            policy: the causal language model below the adapter.
            prompts: token ids.
            sample: False for greedy decoding.
            size: completions at a time.
        """
        device = policy.get_input_embeddings().weight.device
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        lengths = torch.zeros_like(prompt_lengths)
        ended = torch.zeros_like(prompt_lengths, dtype=torch.bool)
        ids = torch.full((len(prompts), int(prompt_lengths.max()) + self.max_length), self.filler, device=device)
        for rows in self._batches(prompts, size):
            tokens, lengths[rows], ended[rows] = self._generate(model, policy, [prompts[row] for row in rows], sample)
            for row, generated in zip(rows, tokens, strict=True):
                end = len(prompts[row])
                ids[row, :end] = torch.tensor(prompts[row], device=device)
                ids[row, end : end + int(lengths[row])] = generated[: int(lengths[row])]
        return Completions(ids[:, : int((prompt_lengths + lengths).max())], prompt_lengths, lengths, ended)

    def _batches(self, prompts: list[list[int]], size: int) -> list[list[int]]:
        """Rows to generate for together."""
        groups = [list(range(len(prompts)))]
        if self.equal_lengths:
            by_length: dict[int, list[int]] = {}
            for row, prompt in enumerate(prompts):
                by_length.setdefault(len(prompt), []).append(row)
            groups = list(by_length.values())
        return [group[start : start + size] for group in groups for start in range(0, len(group), size)]

    @property
    def filler(self) -> int:
        """Any token will do: masks say what is padding."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def _generate(
        self, model: Any, policy: Any, prompts: list[list[int]], sample: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = policy.get_input_embeddings().weight.device
        width = max(len(prompt) for prompt in prompts)
        rows = [[self.filler] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ends = Ends(len(prompts), width, self.stop_ids, self.stop_strings, self.tokenizer, device)
        settings = GenerationConfig(
            max_new_tokens=self.max_length,
            do_sample=False,  # by `Draw`, if at all
            pad_token_id=self.filler,
            bos_token_id=policy.generation_config.bos_token_id,
            use_cache=True,
        )
        with _only(settings, policy, model):
            out = model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                stopping_criteria=StoppingCriteriaList([ends]),
                logits_processor=LogitsProcessorList([Draw(self.temperature)] if sample else []),
                synced_gpus=self.synced,
            )
        return out[:, width:], ends.lengths, ends.ended


@contextmanager
def _only(settings: GenerationConfig, policy: Any, model: Any) -> Iterator[None]:
    """Put the models' own generation settings away: a top_p there would be sampled from and not be in the scores."""
    saved = policy.generation_config
    policy.generation_config = settings
    try:
        yield
    finally:
        policy.generation_config = saved
