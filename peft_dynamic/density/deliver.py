"""How the density term reaches a loss: the Trainer's step, `outputs.loss`, or `penalty()` in a loop of one's own.

Notable: the term has to be a part of the loss, and not a gradient that is added at the activations. Only the loss knows
by what a loop divides it, for accumulation or by its labels, and by what AMP multiplies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import ReferenceType, ref

import torch

from peft_dynamic.density.collect import Pass
from peft_dynamic.density.trainer_step import current_step


class Delivery:
    """The terms of one density loss, from the pass that made them to the loss that has them.

    Args:
        owner: the density loss, by which a Trainer's step tells terms apart.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        # The model's outputs hold the terms that wait for penalty(): a pass that is dropped takes its graph along.
        self._open: list[ReferenceType[Term]] = []
        self._held: list[Term] = []  # those of outputs that can hold none

    def clear(self) -> None:
        """Drop the terms that wait."""
        self._open, self._held = [], []

    def deliver(self, term: Term, done: Pass, output: Any, add_to_loss: bool) -> Any:
        """Give the term of a pass away; returns the outputs to go on with, or None for the same."""
        step = current_step()
        if step is not None:
            step.add(self._owner, term.weight, term.density, term.rows)
            return None
        if not term.weight or not term.density.requires_grad:
            return None
        loss = _loss_of(output, done) if add_to_loss else None
        watched = [tensor for tensor in tensors_of(output) if tensor.requires_grad and tensor is not loss]
        result = None
        if loss is not None:
            extra = term.density * term.weight
            extra.register_hook(term.mark)
            result = _with_loss(output, loss, loss + extra.to(loss.device))
        for tensor in watched:
            tensor.register_hook(term.check)
        if loss is None:
            self._open = [held for held in self._open if held() is not None] + [ref(term)]
            if not watched:
                self._held.append(term)
        return result

    def penalty(self) -> torch.Tensor:
        """The terms that wait, averaged by their samples.

        Raises:
            RuntimeError: there are none, or a Trainer has them.
        """
        step = current_step()
        if step is not None and id(self._owner) in step.terms:
            raise RuntimeError("a Trainer adds the density term to its loss: leave penalty() out of compute_loss.")
        terms = [term for term in (held() for held in self._open) if term is not None and not term.refused]
        self.clear()
        if not terms:
            raise RuntimeError(
                "penalty() needs a training pass before it whose term is not in a loss yet. Either the model is in "
                "eval mode or without gradients, or it returned a loss, which has the term (add_to_loss=False leaves "
                "it out)."
            )
        rows = sum(term.rows for term in terms)
        total = torch.zeros((), device=terms[0].density.device)
        for term in terms:
            term.used = True
            if term.weight:
                total = total + term.density * (term.weight * term.rows / rows)
        return total


class Term:
    """The term of one pass, and whether a loss has it."""

    def __init__(self, weight: float, density: torch.Tensor, rows: int) -> None:
        self.weight, self.density, self.rows, self.used = weight, density, rows, False
        self.refused = False

    def mark(self, gradient: torch.Tensor) -> None:
        self.used = True

    def check(self, gradient: torch.Tensor) -> None:
        if not self.used:
            self.refused = True
            raise RuntimeError(
                "this loss does not have the density term: it was made from the model's outputs, not from "
                "outputs.loss. Add it yourself, `loss = task_loss + density.penalty()`, with add_to_loss=False if the "
                "model also gets labels. Nothing has been updated."
            )


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors in what a model returned."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | tuple | list):
        return []
    return [value for value in values if isinstance(value, torch.Tensor)]


def _loss_of(output: Any, done: Pass) -> torch.Tensor | None:
    """The loss among a model's outputs: "loss", or the first of a tuple where labels were given."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and output and "labels" in done.inputs:
        loss = output[0]
    else:
        loss = None
    return loss if isinstance(loss, torch.Tensor) and loss.dim() == 0 and loss.requires_grad else None


def _with_loss(output: Any, loss: torch.Tensor, new: torch.Tensor) -> Any:
    if isinstance(output, tuple) and not isinstance(output, Mapping):
        return (new, *output[1:])
    output["loss"] = new
    return output
