"""The density term under `transformers.Trainer` and everything derived from it, TRL's trainers among them.

These compute their loss in their own ways (SFTTrainer ignores `outputs.loss`) and scale it in their own ways (by the
tokens of a whole step, or by its number of parts). What they share is one call: `accelerator.backward(loss)` inside
`Trainer.training_step`, with the loss as it enters the gradients, before AMP scales it. There the term is added,
divided by the number of parts of the step. So this wraps `Trainer.training_step`, and `Trainer.log` for the metric,
once a process, when the first loss is attached; without a loss in the model neither does anything.
"""

from __future__ import annotations

import functools
import logging
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

logger = logging.getLogger(__name__)

METRIC = "density_loss"
# Losses that transformers 5.23 neither divides by the parts of an accumulated step nor by its number of labels.
MULTIPLIED = {"ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"}

_CURRENT: ContextVar[TrainingStep | None] = ContextVar("peft_dynamic_training_step", default=None)
_WARNED: WeakSet[Any] = WeakSet()
_SEEN: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()  # trainer -> [sum of D, how many]


class TrainingStep:
    """The terms of one `Trainer.training_step`, until its loss is there to be added to."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.terms: dict[int, list[tuple[float, torch.Tensor, int]]] = {}

    def add(self, owner: Any, weight: float, density: torch.Tensor, rows: int) -> None:
        """Take the term of one forward pass; several of one step are averaged by their samples."""
        self.terms.setdefault(id(owner), []).append((weight, density, rows))

    def add_to(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss with the terms, scaled as a part of an accumulated step."""
        parts = getattr(self.trainer, "current_gradient_accumulation_steps", None)
        if parts is None:
            parts = self.trainer.args.gradient_accumulation_steps
        self._warn_if_multiplied(parts)
        seen = _SEEN.setdefault(self.trainer, [0.0, 0])
        for terms in self.terms.values():
            rows = sum(count for _, _, count in terms)
            density = sum(value.detach() * (count / rows) for _, value, count in terms)
            seen[0] = seen[0] + density
            seen[1] += 1
            for weight, value, count in terms:
                if weight:
                    loss = loss + (value * (weight * count / rows / parts)).to(loss.device)
        self.terms = {}
        return loss

    def _warn_if_multiplied(self, parts: int) -> None:
        """Say once that the host gives the task another weight beside the density than this run asks for."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        multiplied = getattr(base, "loss_type", None) in MULTIPLIED and getattr(
            self.trainer, "model_accepts_loss_kwargs", False
        )
        if parts > 1 and multiplied and self.trainer not in _WARNED and self.trainer.compute_loss_func is None:
            _WARNED.add(self.trainer)
            # Logged, not warned of: it is the host's doing, and a run with warnings as errors is to go on
            logger.warning(
                f"transformers multiplies the gradient of {type(base).__name__}'s own loss by the {parts} accumulation "
                f"steps, so the density counts 1/{parts} beside it. Train without accumulation, or with {parts} times "
                "the weight."
            )


def current_step() -> TrainingStep | None:
    """The step of a Trainer that is running; None in any other loop."""
    return _CURRENT.get()


def watch_trainers() -> None:
    """Wrap `Trainer.training_step` and `Trainer.log`; a second call changes nothing."""
    from transformers import Trainer

    if getattr(Trainer.training_step, "_adds_activation_density", False):
        return
    training_step, log = Trainer.training_step, Trainer.log

    @functools.wraps(training_step)
    def with_density(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = TrainingStep(self)
        accelerator, backward = self.accelerator, self.accelerator.backward
        own = accelerator.__dict__.get("backward")

        def add_and_go(loss: torch.Tensor, **options: Any) -> Any:
            return backward(step.add_to(loss), **options)

        token = _CURRENT.set(step)
        accelerator.backward = add_and_go
        try:
            result = training_step(self, *args, **kwargs)
        finally:
            _CURRENT.reset(token)
            if own is None:
                del accelerator.backward
            else:
                accelerator.backward = own
        if step.terms:
            raise RuntimeError(
                f"{type(self).__name__} ran its backward pass without accelerator.backward, so the density term is not "
                "in the gradients. Pass add_to_loss=False and add `density.penalty()` to its loss."
            )
        return result

    @functools.wraps(log)
    def log_density(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        seen = _SEEN.get(self)
        if seen is not None and seen[1] and "loss" in logs:
            value = seen[0] / seen[1]
            if self.accelerator.num_processes > 1:
                value = self.accelerator.reduce(value, "mean")
            logs[METRIC] = float(value)
            seen[:] = [0.0, 0]
        return log(self, logs, *args, **kwargs)

    with_density._adds_activation_density = True  # type: ignore[attr-defined]  # a mark on a function
    Trainer.training_step, Trainer.log = with_density, log_density
