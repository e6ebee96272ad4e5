"""What a `rollout_func` generates: called as TRL's GRPOTrainer calls it, and checked before anything is trained on it.

Notable: where a completion ends is decided here as in our own generation, whatever the function thought. Tokens behind
the first end are dropped: a shorter beginning of a sample is a sample too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch

from peft_dynamic.trainers.ppo.completions import Completions, Generator
from peft_dynamic.trainers.ppo.setup import RESERVED

RolloutFunction = Callable[[list[Any], Any], dict[str, Any]]

REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
# Tokens that an environment wrote: they would have to be left out of the losses, the KL and the advantages.
UNSUPPORTED = ("env_mask", "tool_mask")
ROUNDING = 1e-3  # of a log-probability: one of a certain token may come out a little above 0


def call(function: RolloutFunction, prompts: list[Any], trainer: Any) -> Completions:
    """The completions that a function gives for prompts.

    Args:
        function: called with a copy of the prompts, and the trainer.
        prompts: texts or conversations, as the dataset has them.
        trainer: the `PPOTrainer`.

    Raises:
        ValueError: what came back cannot be trained on; the text names the row, the rule and the way out.
        TypeError: it is of the wrong kind.
    """
    try:
        output = function(copy.deepcopy(prompts), trainer)
    except Exception as error:
        error.add_note("Raised by rollout_func. Training stops here; checkpoints that are saved stay as they are.")
        raise
    vocabulary = trainer.policy.config.get_text_config().vocab_size
    device = trainer.policy.get_input_embeddings().weight.device
    return read(output, len(prompts), trainer.generator, vocabulary, device)


def read(output: Any, rows: int, generator: Generator, vocabulary: int, device: Any) -> Completions:
    """Check what a rollout function has returned.

    Args:
        output: `prompt_ids` and `completion_ids`, a list of token ids for each prompt; `logprobs`, a list of numbers
            for each completion, or None; and further fields for the reward functions.
        rows: number of prompts.
        generator: knows what ends a completion, and how long it may be.
        vocabulary: number of tokens that the policy knows.
        device: of the result.

    Raises:
        ValueError: see `call`.
        TypeError: see `call`.
    """
    if not isinstance(output, dict):
        raise TypeError(
            f"rollout_func returned a {type(output).__name__}; it must return a dict with {', '.join(REQUIRED)}."
        )
    if missing := [name for name in REQUIRED if name not in output]:
        raise ValueError(
            f"rollout_func returned {sorted(output)} without {missing[0]!r}. Return {', '.join(REQUIRED)}; logprobs "
            "may be None."
        )
    for name in output:
        if name in UNSUPPORTED:
            raise ValueError(
                f"rollout_func returned a field {name!r}, which marks tokens that the policy did not choose. "
                "PPOTrainer trains on every token of a completion: return completions of the policy alone."
            )
        if name in RESERVED:
            raise ValueError(
                f"rollout_func returned a field {name!r}, which PPOTrainer passes to the reward functions itself. Give "
                "it another name."
            )
    prompts = [_ids("prompt_ids", row, ids, vocabulary) for row, ids in enumerate(_rows("prompt_ids", output, rows))]
    whole = [
        _ids("completion_ids", row, ids, vocabulary) for row, ids in enumerate(_rows("completion_ids", output, rows))
    ]
    ends = [generator.end_of(ids) for ids in whole]
    for row, (prompt, (length, _)) in enumerate(zip(prompts, ends, strict=True)):
        _check_length(row, len(prompt), length, generator)
    lengths = [length for length, _ in ends]
    ids = torch.full(
        (rows, max(len(p) + n for p, n in zip(prompts, lengths, strict=True))), generator.filler, device=device
    )
    for row, (prompt, completion) in enumerate(zip(prompts, whole, strict=True)):
        tokens = prompt + completion[: lengths[row]]
        ids[row, : len(tokens)] = torch.tensor(tokens, device=device)
    return Completions(
        ids,
        torch.tensor([len(prompt) for prompt in prompts], device=device),
        torch.tensor(lengths, device=device),
        torch.tensor([ended for _, ended in ends], device=device),
        _logprobs(output["logprobs"], whole, lengths, device),
        {name: _field(name, value, rows) for name, value in output.items() if name not in REQUIRED},
    )


def _rows(name: str, output: dict[str, Any], rows: int) -> list[Any]:
    value = output[name]
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple):
        raise TypeError(
            f"rollout_func returned {name} as a {type(value).__name__}; it must be a list with one entry for each "
            "prompt."
        )
    if len(value) != rows:
        raise ValueError(
            f"rollout_func returned {len(value)} {name} for {rows} prompts. PPOTrainer samples one completion for each "
            "prompt it passes (num_generations is 1): return one entry for each, in the order of the prompts."
        )
    return list(value)


def _ids(name: str, row: int, ids: Any, vocabulary: int) -> list[int]:
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(ids, list | tuple):
        raise TypeError(f"rollout_func returned {name}[{row}]={ids!r}; it must be a list of token ids.")
    if not ids:
        raise ValueError(
            f"rollout_func returned an empty {name}[{row}]. Each needs at least one token: a completion that ends at "
            "once is the EOS token alone, so keep that token."
        )
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise TypeError(f"rollout_func returned {name}[{row}][{place}]={token!r}; a token id is an int.")
        if not 0 <= int(token) < vocabulary:
            raise ValueError(
                f"rollout_func returned {name}[{row}][{place}]={token}, and the policy has the tokens 0 to "
                f"{vocabulary - 1}. Drop what pads the rows, and generate with the policy's own tokenizer."
            )
    return [int(token) for token in ids]


def _check_length(row: int, prompt: int, completion: int, generator: Generator) -> None:
    if completion > generator.max_length:
        raise ValueError(
            f"rollout_func returned {completion} tokens in completion_ids[{row}], more than max_completion_length="
            f"{generator.max_length}. Limit the generator to trainer.args.max_completion_length tokens."
        )
    if generator.context is not None and prompt + completion > generator.context:
        raise ValueError(
            f"rollout_func returned {prompt} tokens in prompt_ids[{row}] and {completion} in completion_ids[{row}], "
            f"which do not fit in the model's {generator.context} positions. Shorten or drop such prompts."
        )


def _logprobs(logprobs: Any, whole: list[list[int]], lengths: list[int], device: Any) -> torch.Tensor | None:
    """(rows, longest completion), NaN where there is none."""
    if logprobs is None:
        return None
    found = torch.full((len(whole), max(lengths)), math.nan, device=device)
    for row, values in enumerate(_rows("logprobs", {"logprobs": logprobs}, len(whole))):
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, list | tuple) or len(values) != len(whole[row]):
            size = f"{len(values)} numbers" if isinstance(values, list | tuple) else repr(values)
            raise ValueError(
                f"rollout_func returned {size} in logprobs[{row}] for the {len(whole[row])} tokens of completion_ids"
                f"[{row}]. Return one log-probability for each token, None where there is none, or logprobs=None."
            )
        for place, value in enumerate(values):
            if value is None or (isinstance(value, Real) and math.isnan(value)):
                continue  # as vLLM's, where a sampler has none
            if isinstance(value, bool) or not isinstance(value, Real) or not -math.inf < float(value) <= ROUNDING:
                raise ValueError(
                    f"rollout_func returned logprobs[{row}][{place}]={value!r}. It must be the natural logarithm of "
                    "the sampled token's probability: a finite number of at most 0, or None."
                )
            if place < lengths[row]:
                found[row, place] = float(value)
    return found


def _field(name: str, value: Any, rows: int) -> list[Any]:
    """One value for each completion: a list has them, and anything else is that of all."""
    if not isinstance(value, list):
        return [value] * rows
    if len(value) != rows:
        raise ValueError(
            f"rollout_func returned {len(value)} values of {name!r} for {rows} prompts. A list is passed to the reward "
            "functions by completion: return one value for each prompt, or something that is no list."
        )
    return value
