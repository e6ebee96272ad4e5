"""Counting the density of each training pass: which activations, of which tokens, and what autograd keeps for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import nn

from peft_dynamic.density.collect import Collector, Pass
from peft_dynamic.density.settings import layer_factors
from peft_dynamic.density.structure import Activation
from peft_dynamic.functional.density import combine, layer_density
from peft_dynamic.hosts.autograd import in_backward, in_reentrant_checkpoint

# Their own backward keeps their output, so that is what ours keeps too. All others keep their input. Where nothing else
# keeps their output, ours remakes it: one more elementwise operation instead of one more tensor of the block's width.
_KEEPS_OUTPUT = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh)


class Settings(Protocol):
    """What a count reads of its density loss, in each pass anew: some of it may be changed between steps."""

    weight: float
    eps: float
    surrogate: str
    activation_modules: Any
    layer_weights: Any
    include_padding: bool
    when: Callable[[], bool] | None
    weights_name: str


class Count:
    """Watches a model, and gives the density of each of its training passes.

    Args:
        model: the model.
        settings: the density loss.
        on_density: `on_density(density, pass, output)`, with density () and differentiable, returns the output to go on
            with, or None for the same.

    Raises:
        ValueError: no activations were found, or the layer weights do not fit them.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, on_density: Callable[[torch.Tensor, Pass, Any], Any]
    ) -> None:
        self._settings, self._on_density = settings, on_density
        # Of each activation, whether autograd keeps its output anyway, e.g. for a LoRA on the next layer; seen in the
        # first pass. Until that ends, its output and the output's version.
        self._kept: dict[nn.Module, bool] = {}
        self._seen: dict[nn.Module, tuple[ReferenceType[torch.Tensor], int]] = {}
        self._collector = Collector(model, settings.activation_modules, self._begin, self._collect, self._finish)
        self.layers = [layer.name for layer in self._collector.layers]
        try:
            self._factors = layer_factors(self._collector.layers, settings.layer_weights, settings.weights_name)
        except ValueError:
            self._collector.remove()
            raise

    def remove(self) -> None:
        """Stop watching."""
        self._collector.remove()

    def _begin(self, module: nn.Module) -> bool:
        if not (module.training and torch.is_grad_enabled() and self._is_on()):
            return False
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "the density loss does not work under nn.DataParallel, whose replicas share its hooks. Start one "
                "process per device (torchrun, accelerate launch), or show one device only."
            )
        return True

    def _is_on(self) -> bool:
        return self._settings.when is None or self._settings.when()

    def _collect(
        self, layer: Activation, module: nn.Module, args: tuple, output: torch.Tensor, current: Pass | None
    ) -> None:
        if current is None:
            if not (self._settings.weight and self._factors[layer.name] and module.training and output.requires_grad):
                return
            if in_backward():  # checkpointing runs the block again: autograd wants the same tensors kept
                self._density(module, args, output, output, None)
            elif self._is_on():
                raise RuntimeError(
                    f"{layer.name} ran in training outside of the model that the density loss is attached to, so its "
                    "term would be lost. Attach it to the model that your loop calls."
                )
            return
        if not torch.is_grad_enabled():
            if self._settings.weight and in_reentrant_checkpoint():
                raise RuntimeError(
                    "gradient checkpointing with use_reentrant=True runs the blocks without gradients, so the density "
                    "loss would have none. Pass gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            if self._settings.weight:
                return
        fitted, weights = (output, None) if self._settings.include_padding else current.weights(output, layer)
        if self._settings.weight and self._factors[layer.name]:
            value = self._density(module, args, output, fitted, weights)
        else:
            with torch.no_grad():
                value = layer_density(fitted.detach(), weights, self._settings.eps, self._settings.surrogate)
        current.rows = fitted.shape[0]
        current.collected.setdefault(layer.name, []).append(value)

    def _density(
        self,
        module: nn.Module,
        args: tuple,
        output: torch.Tensor,
        fitted: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        # What autograd keeps is the same tensor, in the same shape, when checkpointing runs the block again.
        from_input = not isinstance(module, _KEEPS_OUTPUT) and not getattr(module, "inplace", False)
        if from_input and module not in self._kept and not in_backward():
            self._seen[module] = ref(output), output._version
        if from_input and not self._kept.get(module) and args and isinstance(args[0], torch.Tensor):
            return layer_density(fitted, weights, self._settings.eps, self._settings.surrogate, args[0], module.forward)
        return layer_density(fitted, weights, self._settings.eps, self._settings.surrogate, output)

    def _finish(self, done: Pass, output: Any) -> Any:
        if not done.collected:
            raise RuntimeError(
                "none of the activations that the density loss watches ran in this forward pass, so its term would be "
                f"lost; it watches {self.layers[:3]} ... Name the ones that run: activation_modules=[...]."
            )
        for module, (seen, version) in self._seen.items():
            kept = seen()
            self._kept[module] = kept is not None and kept._version == version
        self._seen.clear()
        layers = [layer for layer in self._collector.layers if layer.name in done.collected]
        means = [torch.stack(done.collected[layer.name]).mean() for layer in layers]
        density = combine(means, [self._factors[layer.name] for layer in layers], [layer.stack for layer in layers])
        return self._on_density(density, done, output)
