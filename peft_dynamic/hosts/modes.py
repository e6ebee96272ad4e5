"""Modes that a block of code needs of a model, put back at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_dynamic.hosts.quantization import unpack_bnb_4bit


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; each module's own mode is put back, also after an error.

    4-bit weights stay trainable: on some CPUs a pass in eval mode would leave the model without gradients for good.
    """
    unpack_bnb_4bit(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside the block; each module's mode is put back, also after an error."""
    with eval_mode(model), torch.no_grad():
        yield


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base model inside the block, for PEFT models and transformers models alike; `requires_grad` is put back."""
    switches = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for module in switches:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in switches:
            module.enable_adapters(True)
        for parameter, required in gradients:  # PEFT makes the active adapter trainable when it enables it
            parameter.requires_grad_(required)
