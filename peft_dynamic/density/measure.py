"""Measures how many of a model's feed-forward activations are active on given data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peft_dynamic.density.collect import Collector, Pass
from peft_dynamic.density.report import DensityReport, DensityRow
from peft_dynamic.density.structure import Activation
from peft_dynamic.functional.density import count_active
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.rules import is_finite


def measure_density(
    model: nn.Module,
    dataloader: Iterable[Any],
    threshold: float = 1e-3,
    activation_modules: str | Sequence[str] | None = None,
    include_padding: bool = False,
    max_batches: int | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> DensityReport:
    """The share of active neurons in each feed-forward layer, exactly and above a threshold.

        density = #{|a| > 0} / #a,   and   #{|a| > threshold} / #a,   over the real tokens of all batches

    In eval mode and without gradients; each module's mode is afterwards what it was. GELU is exactly 0 only where it
    underflows (in float32 below -5.5 or so), so the exact density depends on the dtype, which the report names.

    Args:
        model: any model, with or without PEFT.
        dataloader: batches; a dict is passed as keywords, a tuple as positions, a tensor as the one argument.
        threshold: of the second count.
        activation_modules: as in `ActivationDensityLoss`.
        include_padding: count padding too, as the authors' code does.
        max_batches: stop after so many.
        forward: `forward(model, batch)` in place of the call described above, e.g. one that generates.

    Returns:
        The `DensityReport`.

    Raises:
        ValueError: the threshold is negative, there are no batches, or the model has no activations that are found.

    Source: Runwal et al., AAAI 2025, arXiv 2402.01911; the mean of the report is theirs (over layers, of exact counts).
    """
    if not is_finite(threshold) or threshold < 0:
        raise ValueError(f"threshold must be a number of at least 0, got {threshold!r}; 1e-3 is usual.")
    counts: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}

    def count(layer: Activation, a: torch.Tensor, mask: torch.Tensor | None) -> None:
        exact, total = count_active(a, 0.0, mask)
        above, _ = count_active(a, threshold, mask)
        sums = counts.setdefault(layer.name, [0, 0, 0])
        sums[:] = [sums[0] + exact, sums[1] + above, sums[2] + total]
        dtypes[layer.name] = str(a.dtype).removeprefix("torch.")

    layers = watch(model, dataloader, count, activation_modules, include_padding, max_batches, forward)
    rows = []
    for layer in layers:
        exact, above, total = counts[layer.name]
        rows.append(DensityRow(layer.name, layer.stack, exact / total, above / total, total, dtypes[layer.name]))
    return DensityReport(float(threshold), rows)


def watch(
    model: nn.Module,
    dataloader: Iterable[Any],
    count: Callable[[Activation, torch.Tensor, torch.Tensor | None], None],
    activation_modules: str | Sequence[str] | None,
    include_padding: bool,
    max_batches: int | None,
    forward: Callable[[Any, Any], Any] | None,
) -> list[Activation]:
    """Call `count(layer, activations, mask or None)` in each forward pass over the batches; the others as there.

    Returns:
        The layers that had a real token.

    Raises:
        ValueError: none had, or the model has no activations that are found.
    """
    seen: set[str] = set()

    def see(layer: Activation, module: nn.Module, args: tuple, output: torch.Tensor, current: Pass | None) -> None:
        if current is None:
            return
        fitted, mask = (output, None) if include_padding else current.fit(output, layer)
        if fitted.numel() and (mask is None or mask.any()):
            seen.add(layer.name)
            count(layer, fitted, mask)

    collector = Collector(model, activation_modules, lambda _: True, see, lambda done, output: None)
    try:
        with evaluating(model):
            device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
            for number, batch in enumerate(dataloader):
                if max_batches is not None and number >= max_batches:
                    break
                _call(model, _to(batch, device), forward)
    finally:
        collector.remove()
    if not seen:
        raise ValueError(
            "dataloader: no activation was counted. It gave no batches, or every token was padding, or the forward "
            "pass went past the model; pass include_padding=True or another `forward`."
        )
    return [layer for layer in collector.layers if layer.name in seen]


def _call(model: nn.Module, batch: Any, forward: Callable[[Any, Any], Any] | None) -> None:
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_to(value, device) for value in batch]
    return batch
