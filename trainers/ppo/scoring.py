"""Log-probabilities and values of completions, from one pass of the policy over prompts and completions.

Notable: rows are padded on the right, prompt and completion side by side, so every architecture and every adapter
counts positions as it does without padding. Only the tokens of completions are projected onto the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from peft_dynamic.functional.token_logprobs import token_logprobs
from peft_dynamic.hosts.deepspeed import at_hand, gather_with, gathering
from peft_dynamic.hosts.modes import eval_mode
from peft_dynamic.hosts.offload import whole
from peft_dynamic.trainers.ppo.value_head import NAME, ValueFunction


class Sequences:
    """Prompts with their completions, right-padded.

    Args:
        ids: (batch, tokens).
        prompt_lengths: (batch,) int.
        completion_lengths: (batch,) int, at least 1.
    """

    def __init__(self, ids: torch.Tensor, prompt_lengths: torch.Tensor, completion_lengths: torch.Tensor) -> None:
        self.prompt_lengths, self.completion_lengths = prompt_lengths, completion_lengths
        self.ids = ids[:, : int((prompt_lengths + completion_lengths).max())]

    def inputs(self) -> dict[str, torch.Tensor]:
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        mask = columns < (self.prompt_lengths + self.completion_lengths)[:, None]
        return {"input_ids": self.ids, "attention_mask": mask.long()}

    def states(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where state t = 0..n of each row is: its row (places,), and its column, the last token of the state."""
        t = torch.arange(width + 1, device=self.ids.device)
        rows, t = torch.nonzero(t <= self.completion_lengths[:, None], as_tuple=True)
        return rows, self.prompt_lengths[rows] - 1 + t


class Scorer:
    """Reads a policy's log-probabilities and values.

    Args:
        policy: the causal language model, below any adapter wrapper.
        temperature: of the policy.
    """

    def __init__(self, policy: Any, temperature: float) -> None:
        self.policy = policy
        self.temperature = temperature
        self.head = policy.get_output_embeddings()
        self.scale = _known_scale(policy.config)
        # None where the head is more than one plain matrix: then the model's own logits are taken.
        self.direct = self._head_is_direct()

    def __call__(
        self,
        model: Callable[..., Any],
        sequences: Sequences,
        width: int,
        values: bool = True,
        within: AbstractContextManager[None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of the completions' tokens, and the values of their states.

        Args:
            model: the policy, with all that is wrapped around it.
            sequences: of this batch.
            width: places per row in what is returned.
            values: whether to ask the value function too.
            within: entered for the pass, such as one that switches the adapter off.

        Returns:
            log-probabilities (batch, width), and values (batch, width + 1) of the states 0..n of each row, or None;
            float32, 0 in the places that are not taken.
        """
        rows, columns = sequences.states(width)
        outer: Any = getattr(model, "module", model)  # below what DDP and DeepSpeed put around it

        def read(*args: Any, **inputs: Any) -> ModelOutput:
            gather_with(outer, self.head.parameters(recurse=False))
            return self._read(sequences, rows, columns, values, inputs)

        answer = _forward(self.policy, read)
        # In this order: an adapter with virtual tokens is switched off by keeping the policy's forward of that moment
        with answer, within or nullcontext():
            found = model(**sequences.inputs())
        t = columns - sequences.prompt_lengths[rows] + 1
        acts = t < sequences.completion_lengths[rows]
        batch = len(sequences.ids)
        logprobs = found["logprobs"].new_zeros(batch, width).index_put((rows[acts], t[acts]), found["logprobs"])
        if not values:
            return logprobs, None
        return logprobs, found["state_values"].new_zeros(batch, width + 1).index_put((rows, t), found["state_values"])

    def _read(
        self, sequences: Sequences, rows: torch.Tensor, columns: torch.Tensor, values: bool, inputs: dict[str, Any]
    ) -> ModelOutput:
        """What the policy's forward does while it is asked for log-probabilities; `inputs` come through the adapter."""
        inputs = {key: value for key, value in inputs.items() if value is not None and key != "labels"}
        inputs["use_cache"] = False
        length = sequences.ids.shape[1]
        acts = columns < (sequences.prompt_lengths + sequences.completion_lengths)[rows] - 1
        next_ids = sequences.ids[rows[acts], columns[acts] + 1]
        if self.direct:
            hidden = self.policy.base_model(**inputs)[0]
            logits = None
        else:
            hidden, logits = self._with_logits(inputs)
        # A prompt-learning adapter puts its virtual tokens in front.
        shift = hidden.shape[1] - length
        states = hidden[rows, columns + shift]
        output = ModelOutput()
        if logits is None:
            scale, weight = self.scale / self.temperature, whole(self.head.weight)
            assert weight is not None
            output["logprobs"] = token_logprobs(states[acts], weight, whole(self.head.bias), next_ids, scale)
        else:
            chosen = logits[rows[acts], columns[acts] + shift].float() / self.temperature
            output["logprobs"] = torch.log_softmax(chosen, dim=-1).gather(1, next_ids[:, None])[:, 0]
        if values:
            function: ValueFunction = getattr(self.policy, NAME)
            output["state_values"] = function(states, rows * length + columns, **sequences.inputs())
        return output

    def _with_logits(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and the model's own logits, of all positions."""
        kept: list[torch.Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        try:
            logits = type(self.policy).forward(self.policy, **inputs).logits
        finally:
            handle.remove()
        return kept[-1], logits

    @torch.no_grad()
    def _head_is_direct(self) -> bool:
        """Whether hidden states times one matrix, and a known factor, are the model's logits: tried, not assumed."""
        if type(self.head) is not nn.Linear or self.policy.base_model is self.policy:
            return False
        ids = torch.arange(4, device=self.head.weight.device)[None] % self.head.out_features
        with eval_mode(self.policy), gathering(self.policy):
            logits = self._with_logits({"input_ids": ids, "use_cache": False})[1]
            base = self.policy.base_model(input_ids=ids, use_cache=False)[0]
        with at_hand(self.head.parameters(recurse=False)):
            mine = nn.functional.linear(base.to(self.head.weight.dtype), self.head.weight, self.head.bias) * self.scale
        return bool((mine - logits).abs().max() <= 1e-2 * logits.abs().max())


def _known_scale(config: Any) -> float:
    """The factor that a few architectures put on their logits."""
    scale = getattr(config, "logit_scale", None)  # Cohere
    divisor = getattr(config, "logits_scaling", None)  # Granite
    return float(scale or 1.0) / float(divisor or 1.0)


@contextmanager
def _forward(policy: Any, answer: Callable[..., Any]) -> Iterator[None]:
    """Let the policy's forward be `answer`, inside all wrappers, for as long as this lasts."""
    own = policy.__dict__.get("forward")
    policy.forward = answer
    try:
        yield
    finally:
        if own is None:
            del policy.forward
        else:
            policy.forward = own
