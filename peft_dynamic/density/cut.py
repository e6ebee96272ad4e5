"""A threshold for activations, in training as in evaluation: what makes a GELU or SiLU model sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from peft_dynamic.density.measure import watch
from peft_dynamic.density.structure import Activation, find_activations
from peft_dynamic.functional.density import SizeCounts
from peft_dynamic.hosts.quantization import unpack_bnb_4bit
from peft_dynamic.rules import is_finite


class ActivationCut:
    """A model whose small activations are 0; made by `cut_activations`.

    Attributes:
        thresholds: name of an activation -> the size up to which it is 0. The values may be changed between steps.
        layers: names of the activations.
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float | Mapping[str, float],
        activation_modules: str | Sequence[str] | None = None,
    ) -> None:
        if not isinstance(threshold, Mapping) and (not is_finite(threshold) or threshold <= 0):
            raise ValueError(
                f"threshold must be a positive number, got {threshold!r}. A GELU's negative values end at -0.17, so "
                "0.2 keeps its larger positive ones; calibrate_cut(model, dataloader, density) finds one per layer."
            )
        found, self.thresholds = thresholds_of(model, threshold, activation_modules)
        cut = [item.name for item in found if any(map(_is_cut, item.module._forward_hooks.values()))]
        if cut:
            raise ValueError(f"the activations {cut[:3]} are cut already: detach() the other cut_activations first.")
        self.layers = list(self.thresholds)
        unpack_bnb_4bit(model)
        # Before all other hooks: a density loss, a measurement and sparse_inference see what is left
        self._handles = [
            item.module.register_forward_hook(partial(_cut, self.thresholds, item.name), prepend=True) for item in found
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
    model: nn.Module,
    threshold: float | Mapping[str, float],
    activation_modules: str | Sequence[str] | None = None,
) -> ActivationCut:
    """Set activations with |a| <= threshold to 0, in training and in evaluation, until `detach()`.

    A GELU or a SiLU is hardly ever exactly 0, and the density loss moves it little. Most of its activations are small
    though: fine-tune the task first, cut, and go on training, so that the weights make up for what is lost. A neuron
    gets no gradient from the tokens at which it is cut.

        cut = cut_activations(model, 0.2)  # or calibrate_cut(model, dataloader, density=0.4)
        # ... train on, with or without an ActivationDensityLoss, and evaluate ...

    The threshold is no part of the saved model or adapter. Cut again after loading, or decode with
    `sparse_inference(model, threshold=...)`, which is the same function.

    Args:
        model: with or without PEFT.
        threshold: positive; or a dict from names of activations to numbers of at least 0, as `calibrate_cut` gives it,
            which leaves the activations it does not name alone.
        activation_modules: as in `ActivationDensityLoss`; None with a dict.

    Returns:
        The attached `ActivationCut`; a context manager, and `detach()` ends it.

    Raises:
        ValueError: the threshold has no meaning, the model's activations are cut already, or none are found.

    Source: ours, for models whose activation has no exact zeros; for the loss see `ActivationDensityLoss`.
    """
    return ActivationCut(model, threshold, activation_modules)


def calibrate_cut(
    model: nn.Module,
    dataloader: Iterable[Any],
    density: float,
    activation_modules: str | Sequence[str] | None = None,
    include_padding: bool = False,
    max_batches: int | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> dict[str, float]:
    """A threshold for each layer that leaves the same share of its activations, on given data.

        t_l = the smallest t with  #{|a_l| > t} / #a_l <= density   over the real tokens of all batches

    One number for all layers cuts those with small activations almost whole and the others hardly at all. Cut with
    these, train on, and the density stays near what was asked for:

        thresholds = calibrate_cut(model, train_batches, density=0.4, max_batches=8)  # a dict: json.dump it
        cut = cut_activations(model, thresholds)

    t_l is exact to 1/1024 of its size; 0 where no more activations than that are active anyway, as after a ReLU.

    Args:
        model: with or without PEFT, fine-tuned to the task already.
        dataloader: batches, as in `measure_density`; a few hundred rows of the training data will do.
        density: share of the activations to keep, above 0 and below 1.
        activation_modules: as in `ActivationDensityLoss`.
        include_padding: as in `measure_density`.
        max_batches: as there.
        forward: as there.

    Returns:
        Name of the activation -> threshold, for `cut_activations` and `sparse_inference`.

    Raises:
        ValueError: density has no meaning, there are no batches, or the model has no activations that are found.

    Source: the quantile of a block's activations as its threshold is that of CATS (Lee et al., COLM 2024,
        arXiv 2404.08763), there for the gate of a gated block.
    """
    if not is_finite(density) or not 0 < density < 1:
        raise ValueError(
            f"density must be a number above 0 and below 1, got {density!r}. It is the share of activations to keep: "
            "0.4 sets 60 % of them to 0."
        )
    sizes: dict[str, SizeCounts] = {}

    def count(layer: Activation, a: torch.Tensor, mask: torch.Tensor | None) -> None:
        sizes.setdefault(layer.name, SizeCounts()).add(a, mask)

    watch(model, dataloader, count, activation_modules, include_padding, max_batches, forward)
    return {name: counts.threshold(density) for name, counts in sizes.items()}


def thresholds_of(
    model: nn.Module, threshold: float | Mapping[str, float], activation_modules: str | Sequence[str] | None
) -> tuple[list[Activation], dict[str, float]]:
    """The activations to cut, and the threshold of each by its name.

    Raises:
        ValueError: a dict does not fit the model, or is given together with `activation_modules`.
    """
    if not isinstance(threshold, Mapping):
        found = find_activations(model, activation_modules)
        return found, {item.name: float(threshold) for item in found}
    if activation_modules is not None:
        raise ValueError(
            f"activation_modules={activation_modules!r} with a dict of thresholds: the dict names the activations. "
            "Leave activation_modules out."
        )
    wrong = {name: value for name, value in threshold.items() if not is_finite(value) or value < 0}
    if wrong or not threshold:
        raise ValueError(
            f"threshold must map names of activations to numbers of at least 0, got {wrong or threshold!r}. "
            "calibrate_cut(model, dataloader, density) makes such a dict."
        )
    found = [item for item in find_activations(model, list(threshold)) if item.name in threshold]
    missing = sorted(set(threshold) - {item.name for item in found})
    if missing:
        raise ValueError(
            f"threshold names activations that the model does not have: {missing[:3]}. Pass the dict that "
            "calibrate_cut made for this model; its names are those of the model without adapters."
        )
    return found, {item.name: float(threshold[item.name]) for item in found}


def _cut(thresholds: dict[str, float], name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.masked_fill(output.abs() <= thresholds[name], 0)


def _is_cut(hook: object) -> bool:
    return isinstance(hook, partial) and hook.func is _cut
