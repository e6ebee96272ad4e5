"""The density loss: fine-tuning with fewer active neurons, on any model and in any training loop.

Notable: where the loss is the model's own, the term is added to `outputs.loss` and scaled with it. Where a Trainer
makes the loss, the term is added to what it hands to `accelerator.backward`. Where neither holds, the user adds
`penalty()`, and a backward pass that would leave the term out is stopped before it changes a parameter. No way drops it
in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peft_dynamic.density.collect import Pass
from peft_dynamic.density.count import Count
from peft_dynamic.density.deliver import Delivery, Term, tensors_of
from peft_dynamic.density.settings import check_settings as check_settings  # was here before
from peft_dynamic.density.trainer_step import watch_trainers
from peft_dynamic.hosts.quantization import unpack_bnb_4bit


class ActivationDensityLoss:
    """Adds `weight * D` to the training loss, with D the smooth density of the feed-forward activations.

        total = task loss + weight * D        D: equations (1) to (5) of `peft_dynamic.functional.density`

    D is a mean over samples, so under gradient accumulation and over processes the gradient is that of the whole batch
    as long as the parts have equally many samples. Nothing is computed in eval mode and without gradients.

        density = ActivationDensityLoss(weight=1.0).attach(model)   # after get_peft_model, before training
        # ... train as always: bare loop with outputs.loss, accelerate, transformers.Trainer, trl.SFTTrainer ...
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
        self._count: Count | None = None
        self._delivery = Delivery(self)

    @property
    def layers(self) -> list[str]:
        """Names of the activations that are counted, as in the model without adapters."""
        return list(self._count.layers) if self._count is not None else []

    def attach(self, model: nn.Module) -> ActivationDensityLoss:
        """Start to watch a model; with PEFT, the `PeftModel` or the model inside.

        Returns:
            Itself.

        Raises:
            ValueError: attached already, no activations found, or `layer_weights` does not fit them.
        """
        if self._count is not None:
            raise ValueError("this ActivationDensityLoss is attached already: detach() it first, or make another one.")
        self._count = Count(model, self, self._take)
        unpack_bnb_4bit(model)
        watch_trainers()
        return self

    def detach(self) -> None:
        """Stop, and take all hooks away."""
        if self._count is not None:
            self._count.remove()
        self._count = None
        self._delivery.clear()

    def penalty(self) -> torch.Tensor:
        """`weight * D` of the forward passes since the last call, a () tensor to add to a loss of your own.

        Several passes are averaged by their samples. Divide it as you divide your loss, e.g. for accumulation.

        Raises:
            RuntimeError: there was no training pass, or its term is in `outputs.loss` already.
        """
        return self._delivery.penalty()

    def _take(self, density: torch.Tensor, done: Pass, output: Any) -> Any:
        """The density of a pass is there: give its term to a loss."""
        self.value = density.detach()
        if self.weight and not density.requires_grad and any(tensor.requires_grad for tensor in tensors_of(output)):
            raise RuntimeError(
                "the density loss has no gradient: nothing that is trained lies in front of the activations that it "
                f"watches ({self.layers[0]} ...). Train layers in front of them, e.g. with target_modules='all-linear'."
            )
        return self._delivery.deliver(Term(self.weight, density, done.rows), done, output, self.add_to_loss)
