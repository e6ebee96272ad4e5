"""A threshold for activations, in training as in evaluation: what makes a GELU or SiLU model sparse."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType

import torch
from torch import nn

from .loss import is_number
from .structure import find_activations


class ActivationCut:
    """A model whose small activations are 0; made by `cut_activations`.

    Attributes:
        threshold: activations with |a| <= threshold are 0.
        layers: names of the activations.
    """

    def __init__(
        self, model: nn.Module, threshold: float, activation_modules: str | Sequence[str] | None = None
    ) -> None:
        if not is_number(threshold) or threshold <= 0:
            raise ValueError(
                f"threshold must be a positive number, got {threshold!r}. A GELU's negative values end at -0.17, so "
                "0.2 keeps its larger positive ones."
            )
        found = find_activations(model, activation_modules)
        cut = [name for name, module, _ in found if any(_threshold(hook) for hook in module._forward_hooks.values())]
        if cut:
            raise ValueError(f"the activations {cut[:3]} are cut already: detach() the other cut_activations first.")
        self.threshold, self.layers = float(threshold), [name for name, *_ in found]
        # Before all other hooks: a density loss, a measurement and sparse_inference see what is left
        self._handles = [
            module.register_forward_hook(partial(_cut, self.threshold), prepend=True) for _, module, _ in found
        ]

    def detach(self) -> None:
        """Give the model its small activations back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> ActivationCut:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def cut_activations(
    model: nn.Module, threshold: float, activation_modules: str | Sequence[str] | None = None
) -> ActivationCut:
    """Set activations with |a| <= threshold to 0, in training and in evaluation, until `detach()`.

    A GELU or a SiLU is hardly ever exactly 0, and the density loss moves it little. Most of its activations are small
    though: fine-tune the task first, cut, and go on training, so that the weights make up for what is lost. A neuron
    gets no gradient from the tokens at which it is cut.

        cut = cut_activations(model, 0.2)
        # ... train on, with or without an ActivationDensityLoss, and evaluate ...

    The threshold is no part of the saved model or adapter. Cut again after loading, or decode with
    `sparse_inference(model, threshold=...)`, which is the same function.

    Args:
        model: with or without PEFT.
        threshold: positive.
        activation_modules: as in `ActivationDensityLoss`.

    Returns:
        The attached `ActivationCut`; a context manager, and `detach()` ends it.

    Raises:
        ValueError: the threshold has no meaning, the model's activations are cut already, or none are found.

    Source: ours, for models whose activation has no exact zeros; for the loss see `ActivationDensityLoss`.
    """
    return ActivationCut(model, threshold, activation_modules)


def _cut(threshold: float, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.masked_fill(output.abs() <= threshold, 0)


def _threshold(hook: object) -> bool:
    return isinstance(hook, partial) and hook.func is _cut
