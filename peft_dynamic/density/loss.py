"""The density loss: fine-tuning with fewer active neurons, on any model and in any training loop.

Notable: where the loss is the model's own, the term is added to `outputs.loss` and scaled with it. Where a Trainer
makes the loss, the term is added to what it hands to `accelerator.backward`. Where neither holds, the user adds
`penalty()`, and a backward pass that would leave the term out is stopped before it changes a parameter. No way drops it
in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn

from peft_dynamic.density.collect import Collector, Pass, in_backward, in_reentrant_checkpoint
from peft_dynamic.density.hosts import current_step, watch_trainers
from peft_dynamic.density.structure import Activation, check_patterns
from peft_dynamic.functional.density import SURROGATES, combine, layer_density
from peft_dynamic.hosts.quantization import keep_training_on_cpu
from peft_dynamic.rules import is_finite

# Their own backward keeps their output, so that is what ours keeps too. All others keep their input. Where nothing else
# keeps their output, ours remakes it: one more elementwise operation instead of one more tensor of the block's width.
_KEEPS_OUTPUT = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh)


class ActivationDensityLoss:
    """Adds `weight * D` to the training loss, with D the smooth density of the feed-forward activations.

        total = task loss + weight * D        D: equations (1) to (5) of `peft_dynamic.functional.density`

    D is a mean over samples, so under gradient accumulation and over processes the gradient is that of the whole batch
    as long as the parts have equally many samples. Nothing is computed in eval mode and without gradients.

        density = ActivationDensityLoss(weight=1.0).attach(model)   # after get_peft_model, before training
        ... train as always: bare loop with outputs.loss, accelerate, transformers.Trainer, trl.SFTTrainer ...
        density.detach()

    A loop that makes its own loss from the logits adds the term itself: `loss = task + density.penalty()`.

    Args:
        weight: factor of D. At 0 the training is bitwise what it is without; D is still measured.
        eps: the square of the surrogate's width: at |a| = sqrt(eps) an activation counts half. 1e-7 in the authors'
            code, 20.0 in theirs for prompt tuning.
        surrogate: "rational" a^2 / (a^2 + eps), the authors' code; "tanh" and "hinge" of the same width are ours.
        activation_modules: None to find the feed-forward activations by structure; or the end of a module's name, a
            list of such ends, or a regular expression of whole names.
        layer_weights: w_l, a number per layer in the order of `layers`, or a dict from names or their ends to numbers,
            1 for the layers that it leaves out. None for 1. They are not normalised.
        include_padding: count padding too, as the authors' code does.
        add_to_loss: add the term to `outputs.loss` of a model that computes its loss; False to leave it to `penalty()`.
            Under a Trainer the term is added in either case.

    Attributes:
        weight, eps: may be changed between steps, e.g. by a schedule.
        layers: names of the activations, once attached.
        value: D of the last training pass as a () tensor without gradients; None before.

    Raises:
        ValueError, TypeError: an argument has no meaning; the message names it, its value, the rule and the fix.

    Source: B. Runwal, T. Pedapati, P.-Y. Chen: From PEFT to DEFT: Parameter Efficient Finetuning for Reducing
    Activation Density in Transformers, AAAI 2025, arXiv 2402.01911; the authors' code IBM/DEFT. Other than there:
    padding is left out by default, and the loss works with checkpointing. Not the method that PEFT calls DEFT.
    """

    weights_name = "layer_weights"  # what messages call it: a configuration has another name for it

    def __init__(
        self,
        weight: float = 1.0,
        eps: float = 1e-7,
        surrogate: str = "rational",
        activation_modules: str | Sequence[str] | None = None,
        layer_weights: Sequence[float] | Mapping[str, float] | None = None,
        include_padding: bool = False,
        add_to_loss: bool = True,
    ) -> None:
        check_settings(type(self).__name__, weight, eps, surrogate, activation_modules, layer_weights)
        self.weight, self.eps, self.surrogate = float(weight), float(eps), surrogate
        self.activation_modules, self.layer_weights = activation_modules, layer_weights
        self.include_padding, self.add_to_loss = include_padding, add_to_loss
        self.value: torch.Tensor | None = None
        self.when: Callable[[], bool] | None = None  # a tuner's: whether its adapter is the active one
        self._collector: Collector | None = None
        self._factors: dict[str, float] = {}
        # Of each activation, whether autograd keeps its output anyway, e.g. for a LoRA on the next layer; seen in the
        # first pass. Until that ends, its output and the output's version.
        self._kept: dict[nn.Module, bool] = {}
        self._seen: dict[nn.Module, tuple[ReferenceType[torch.Tensor], int]] = {}
        # The model's outputs hold the terms that wait for penalty(): a pass that is dropped takes its graph along.
        self._open: list[ReferenceType[_Term]] = []
        self._held: list[_Term] = []  # those of outputs that can hold none

    @property
    def layers(self) -> list[str]:
        """Names of the activations that are counted, as in the model without adapters."""
        return [layer.name for layer in self._collector.layers] if self._collector is not None else []

    def attach(self, model: nn.Module) -> ActivationDensityLoss:
        """Start to watch a model; with PEFT, the `PeftModel` or the model inside.

        Returns:
            Itself.

        Raises:
            ValueError: attached already, no activations found, or `layer_weights` does not fit them.
        """
        if self._collector is not None:
            raise ValueError("this ActivationDensityLoss is attached already: detach() it first, or make another one.")
        collector = Collector(model, self.activation_modules, self._begin, self._collect, self._finish)
        try:
            self._factors = _layer_factors(collector.layers, self.layer_weights, self.weights_name)
        except ValueError:
            collector.remove()
            raise
        self._collector = collector
        keep_training_on_cpu(model)
        watch_trainers()
        return self

    def detach(self) -> None:
        """Stop, and take all hooks away."""
        if self._collector is not None:
            self._collector.remove()
        self._collector, self._open, self._held = None, [], []
        self._kept, self._seen = {}, {}

    def penalty(self) -> torch.Tensor:
        """`weight * D` of the forward passes since the last call, a () tensor to add to a loss of your own.

        Several passes are averaged by their samples. Divide it as you divide your loss, e.g. for accumulation.

        Raises:
            RuntimeError: there was no training pass, or its term is in `outputs.loss` already.
        """
        step = current_step()
        if step is not None and id(self) in step.terms:
            raise RuntimeError("a Trainer adds the density term to its loss: leave penalty() out of compute_loss.")
        terms = [term for term in (held() for held in self._open) if term is not None and not term.refused]
        self._open, self._held = [], []
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

    # --- the hooks' side

    def _begin(self, module: nn.Module) -> bool:
        if not (module.training and torch.is_grad_enabled()) or (self.when is not None and not self.when()):
            return False
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "the density loss does not work under nn.DataParallel, whose replicas share its hooks. Start one "
                "process per device (torchrun, accelerate launch), or show one device only."
            )
        return True

    def _collect(
        self, layer: Activation, module: nn.Module, args: tuple, output: torch.Tensor, current: Pass | None
    ) -> None:
        if current is None:
            if not (self.weight and self._factors[layer.name] and module.training and output.requires_grad):
                return
            if in_backward():  # checkpointing runs the block again: autograd wants the same tensors kept
                self._density(module, args, output, output, None)
            elif self.when is None or self.when():
                raise RuntimeError(
                    f"{layer.name} ran in training outside of the model that the density loss is attached to, so its "
                    "term would be lost. Attach it to the model that your loop calls."
                )
            return
        if not torch.is_grad_enabled():
            if self.weight and in_reentrant_checkpoint():
                raise RuntimeError(
                    "gradient checkpointing with use_reentrant=True runs the blocks without gradients, so the density "
                    "loss would have none. Pass gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            if self.weight:
                return
        fitted, weights = (output, None) if self.include_padding else current.weights(output, layer)
        if self.weight and self._factors[layer.name]:
            value = self._density(module, args, output, fitted, weights)
        else:
            with torch.no_grad():
                value = layer_density(fitted.detach(), weights, self.eps, self.surrogate)
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
            return layer_density(fitted, weights, self.eps, self.surrogate, args[0], module.forward)
        return layer_density(fitted, weights, self.eps, self.surrogate, output)

    def _finish(self, done: Pass, output: Any) -> Any:
        if not done.collected:
            raise RuntimeError(
                "none of the activations that the density loss watches ran in this forward pass, so its term would be "
                f"lost; it watches {self.layers[:3]} ... Name the ones that run: activation_modules=[...]."
            )
        assert self._collector is not None
        for module, (seen, version) in self._seen.items():
            kept = seen()
            self._kept[module] = kept is not None and kept._version == version
        self._seen.clear()
        layers = [layer for layer in self._collector.layers if layer.name in done.collected]
        means = [torch.stack(done.collected[layer.name]).mean() for layer in layers]
        density = combine(means, [self._factors[layer.name] for layer in layers], [layer.stack for layer in layers])
        self.value = density.detach()
        tensors = _tensors(output)
        if self.weight and not density.requires_grad and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(
                "the density loss has no gradient: nothing that is trained lies in front of the activations that it "
                f"watches ({self.layers[0]} ...). Train layers in front of them, e.g. with target_modules='all-linear'."
            )
        term = _Term(self.weight, density, done.rows)
        step = current_step()
        if step is not None:
            step.add(self, self.weight, density, done.rows)
            return None
        if not self.weight or not density.requires_grad:
            return None
        loss = _loss_of(output, done) if self.add_to_loss else None
        result = None
        if loss is not None:
            extra = density * self.weight
            extra.register_hook(term.mark)
            result = _with_loss(output, loss, loss + extra.to(loss.device))
        watched = [tensor for tensor in tensors if tensor.requires_grad and tensor is not loss]
        for tensor in watched:
            tensor.register_hook(term.check)
        if loss is None:
            self._open = [held for held in self._open if held() is not None] + [ref(term)]
            if not watched:
                self._held.append(term)
        return result


class _Term:
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


def _tensors(output: Any) -> list[torch.Tensor]:
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


def _layer_factors(
    layers: list[Activation], given: Sequence[float] | Mapping[str, float] | None, name: str
) -> dict[str, float]:
    names = [layer.name for layer in layers]
    if given is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(given, Mapping):
        factors = dict.fromkeys(names, 1.0)
        for key, value in given.items():
            matched = [each for each in names if each == key or each.endswith(f".{key}") or f".{key}." in f".{each}."]
            if not matched:
                raise ValueError(f"{name} has {key!r}, which is the name of no counted layer; there are {names}.")
            factors.update(dict.fromkeys(matched, float(value)))
        return factors
    if len(given) != len(names):
        raise ValueError(
            f"{name} must have one number for each of the {len(names)} layers {names}, got {len(given)}: {given!r}."
        )
    return dict(zip(names, map(float, given), strict=True))


def check_settings(
    owner: str, weight: Any, eps: Any, surrogate: Any, activation_modules: Any, layer_weights: Any, prefix: str = ""
) -> None:
    """Refuse settings without a meaning; `owner` and `prefix` make the names in the messages."""
    if not is_finite(weight) or weight < 0:
        raise ValueError(
            f"{owner}: {prefix}weight must be a number of at least 0, got {weight!r}. 0 switches the loss off."
        )
    if not is_finite(eps) or not eps > 0:
        raise ValueError(f"{owner}: {prefix}eps must be a positive number, got {eps!r}. The authors' is 1e-7.")
    if surrogate not in SURROGATES:
        raise ValueError(f"{owner}: surrogate must be one of {SURROGATES}, got {surrogate!r}.")
    check_patterns(activation_modules, owner)
    if layer_weights is not None:
        values = list(layer_weights.values()) if isinstance(layer_weights, Mapping) else layer_weights
        named = not isinstance(layer_weights, Mapping) or all(isinstance(key, str) for key in layer_weights)
        if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not named:
            raise TypeError(
                f"{owner}: {prefix}layer_weights must be a list of numbers or a dict from names to numbers, got "
                f"{layer_weights!r}."
            )
        off = not isinstance(layer_weights, Mapping) and not any(values)  # a dict leaves the others at 1
        if not all(is_finite(value) and value >= 0 for value in values) or off:
            raise ValueError(
                f"{owner}: {prefix}layer_weights must be numbers of at least 0, some of them above 0, got "
                f"{layer_weights!r}. To switch the loss off pass {prefix}weight=0."
            )
