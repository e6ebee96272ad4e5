"""Calls the reward functions, with the arguments that TRL's GRPOTrainer gives them, and checks what they return."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence, Set
from numbers import Real
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

LARGEST = 1e9  # the square of a return, summed over a rollout, has to fit into float32

RewardFunction = str | nn.Module | Callable[..., Any]


class Rewards:
    """One or more reward functions, each with a name and a weight.

    Args:
        functions: a function, an async function, a model with one label, its name or path, or a list of these.
        weights: a factor each, or None for 1 each.
        tokenizers: for the models, in the order of the functions; None to load those that belong to them.
        init_kwargs: for loading models by name.

    Raises:
        ValueError: no functions, or other numbers of weights or tokenizers than of functions.
        TypeError: something that cannot be called.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        tokenizers: Any = None,
        init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        listed = list(functions) if isinstance(functions, list | tuple) else [functions]
        tokenizers = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(listed)
        if not listed:
            raise ValueError("reward_funcs is empty: pass at least one function of prompts and completions.")
        if weights is not None and len(weights) != len(listed):
            raise ValueError(
                f"reward_weights has {len(weights)} numbers for {len(listed)} reward_funcs: pass one each."
            )
        if len(tokenizers) != len(listed):
            raise ValueError(
                f"reward_processing_classes has {len(tokenizers)} entries for {len(listed)} reward_funcs: pass one "
                "each, None where the function is no model."
            )
        self.weights = torch.tensor([1.0] * len(listed) if weights is None else _weights(weights))
        self.functions: list[Any] = []
        self.tokenizers: list[Any] = []
        self.names: list[str] = []
        for function, tokenizer in zip(listed, tokenizers, strict=True):
            if isinstance(function, str):
                function = AutoModelForSequenceClassification.from_pretrained(
                    function, num_labels=1, **(init_kwargs or {})
                )
            if isinstance(function, nn.Module):
                tokenizer = _prepare_model(function, tokenizer)
            elif not callable(function):
                raise TypeError(f"reward_funcs holds {function!r}, which is neither a function, a model nor a name.")
            name = _name(function)
            if name in self.names:
                name += f"_{sum(other.startswith(name) for other in self.names) + 1}"
            self.functions.append(function)
            self.tokenizers.append(tokenizer)
            self.names.append(name)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: dict[str, Any],
        device: torch.device,
    ) -> torch.Tensor:
        """The rewards of some completions.

        Args:
            prompts: text, or conversations.
            completions: text, or a list with one message of the assistant each.
            completion_ids: the tokens of each.
            columns: further arguments of the functions: the dataset's columns, `trainer_state`, `log_extra` and
                `log_metric`.
            device: of the result, and where reward models run.

        Returns:
            (completions, functions) float32, NaN where a function has returned None.

        Raises:
            ValueError: a function returned something else than a number (or None) per completion, or a completion
                has no reward at all.
        """
        found = torch.empty(len(prompts), len(self.functions), dtype=torch.float32)
        arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        waiting: dict[int, Coroutine[Any, Any, Any]] = {}
        for i, (function, name) in enumerate(zip(self.functions, self.names, strict=True)):
            if isinstance(function, nn.Module):
                scores = self._score(function, self.tokenizers[i], prompts, completions, device)
                found[:, i] = _checked(scores, name, completions)
            elif _is_async(function):
                waiting[i] = function(**arguments)
            else:
                try:
                    returned = function(**arguments)
                except Exception as error:
                    error.add_note(_raised_by(name))
                    raise
                found[:, i] = _checked(returned, name, completions)
        if waiting:
            for i, returned in zip(waiting, self._run(list(waiting.values()), list(waiting)), strict=True):
                found[:, i] = _checked(returned, self.names[i], completions)
        missing = found.isnan().all(dim=1).nonzero()
        if len(missing):
            row = int(missing[0])
            raise ValueError(
                f"All reward functions ({', '.join(self.names)}) returned None for the completion "
                f"{completions[row]!r} of the prompt {prompts[row]!r}. Each completion needs a number from one."
            )
        return found.to(device)

    def total(self, rewards: torch.Tensor) -> torch.Tensor:
        """(completions,) the weighted sum of (completions, functions), without the functions that returned None."""
        return (rewards * self.weights.to(rewards.device)).nansum(dim=1)

    @torch.no_grad()
    def _score(
        self, model: Any, tokenizer: Any, prompts: list, completions: list, device: torch.device
    ) -> torch.Tensor:
        pairs = list(zip(prompts, completions, strict=True))
        if isinstance(prompts[0], str):
            texts = [prompt + completion for prompt, completion in pairs]
        else:
            texts = [tokenizer.apply_chat_template(prompt + answer, tokenize=False) for prompt, answer in pairs]
        inputs = tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        model.to(device).eval()
        return model(**inputs.to(device)).logits[:, 0].float().cpu()

    def _run(self, coroutines: list[Coroutine[Any, Any, Any]], functions: list[int]) -> list[Any]:
        """All at once, in an event loop of our own, which lives on so that the functions' clients may too."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True, name="reward functions").start()

        async def gather() -> list[Any]:
            return await asyncio.gather(*coroutines, return_exceptions=True)

        results = asyncio.run_coroutine_threadsafe(gather(), self._loop).result()
        for i, result in zip(functions, results, strict=True):
            if isinstance(result, BaseException):
                result.add_note(_raised_by(self.names[i]))
                raise result
        return results


def _weights(weights: Sequence[float]) -> list[float]:
    if not all(isinstance(w, Real) and not isinstance(w, bool) and abs(float(w)) <= LARGEST for w in weights):
        raise ValueError(f"reward_weights={weights!r}: each must be a finite number of at most {LARGEST:g}.")
    return [float(weight) for weight in weights]


def _prepare_model(model: Any, tokenizer: Any) -> Any:
    """The tokenizer of a reward model, which pads; the model reads its score off the last token that is not padding."""
    if model.config.num_labels != 1:
        raise ValueError(f"The reward model {_name(model)} has {model.config.num_labels} labels; it must have 1.")
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model.config._name_or_path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.requires_grad_(False)
    return tokenizer


def _name(function: Any) -> str:
    if isinstance(function, nn.Module):
        return str(getattr(function.config, "_name_or_path", "")).rstrip("/").split("/")[-1] or type(function).__name__
    if isinstance(function, functools.partial):
        return _name(function.func)
    return getattr(function, "__name__", type(function).__name__)


def _is_async(function: Any) -> bool:
    if isinstance(function, functools.partial):
        return _is_async(function.func)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _raised_by(name: str) -> str:
    return f"Raised by the reward function {name!r}. Training stops here; checkpoints that are saved stay as they are."


def _checked(returned: Any, name: str, completions: list[Any]) -> torch.Tensor:
    """(completions,) with NaN for None."""
    if isinstance(returned, str | bytes | Mapping | Set):
        raise TypeError(
            f"The reward function {name!r} returned a {type(returned).__name__}, {str(returned)[:80]}; it must return "
            "a list with a number (or None) for each completion, in their order."
        )
    if hasattr(returned, "tolist"):  # of torch, numpy or pandas
        returned = returned.tolist()
    try:
        returned = list(returned)
    except TypeError:
        raise TypeError(
            f"The reward function {name!r} returned {returned!r}; it must return a list with a number (or None) for "
            "each completion."
        ) from None
    if len(returned) != len(completions):
        raise ValueError(
            f"The reward function {name!r} returned {len(returned)} rewards for {len(completions)} completions; it "
            "must return one each, in their order."
        )
    return torch.tensor([_number(*pair, name) for pair in zip(returned, completions, strict=True)])


def _number(reward: Any, completion: Any, name: str) -> float:
    """A reward as a number, NaN for None."""
    if reward is None:
        return math.nan
    if getattr(reward, "shape", None) in ((), (1,)):  # of torch or numpy
        reward = reward.item()
    if not isinstance(reward, Real):
        raise TypeError(
            f"The reward function {name!r} returned {reward!r}, a {type(reward).__name__}, for the completion "
            f"{completion!r}; it must be a finite number, or None where the function does not apply."
        )
    try:
        value = float(reward)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(
            f"The reward function {name!r} returned {reward} for the completion {completion!r}; it must be a "
            "finite number, or None where the function does not apply."
        )
    if abs(value) > LARGEST:
        raise ValueError(
            f"The reward function {name!r} returned {value:g} for the completion {completion!r}; a reward must lie "
            f"between -{LARGEST:g} and {LARGEST:g}: squares of larger ones leave float32, and one of them would turn "
            "all weights into NaN. Scale the rewards."
        )
    return value
