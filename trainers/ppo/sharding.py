"""PPO where FSDP2 or DeepSpeed holds the policy in parts: what is refused, and what has to be done otherwise."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from peft_dynamic.hosts.deepspeed import is_imported, watch_steps
from peft_dynamic.trainers.ppo.reference import is_peft


def is_sharded(trainer: Any) -> bool:
    """Whether an engine may hold the policy in parts."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def check_engine(trainer: Any, value_model: Any) -> None:
    """Raise ValueError for what does not work with the engine that the run was started with."""
    if not is_sharded(trainer):
        return
    engine = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "FSDP1 puts flat buffers in the place of the parameters that generation and the value function read. Set "
            "fsdp_version: 2 in accelerate's configuration."
        )
    if value_model is not None:
        raise ValueError(
            f"value_model: a model of its own for the values was not tried under {engine}. Leave it out for the linear "
            "head, or use DDP."
        )
    if trainer.generator.equal_lengths:
        raise ValueError(
            f"An adapter with virtual tokens generates for prompts of equal length together, and {engine} needs as "
            "many passes on every process. Use a LoRA, or DDP."
        )
    if trainer.is_deepspeed_enabled and trainer.args.target_kl is not None:
        raise ValueError(
            f"target_kl={trainer.args.target_kl} skips steps, which DeepSpeed's learning rates would not know of. "
            "Leave it out, or use DDP or FSDP2."
        )


def generates(trainer: Any) -> None:
    """Let `generate` of the policy gather what it needs, on all processes for as long as one of them generates."""
    trainer.generator.synced = trainer.args.world_size > 1
    model = trainer.model
    if not trainer.is_fsdp_enabled or not is_peft(model) or "generate" in vars(model):
        return
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(model, "generate")  # PEFT's does not call the model that FSDP2 hooks into


class FiniteSteps:
    """Stops before a step of a trainer's DeepSpeed engine whose gradients are not finite.

    accelerate lets the engine step inside `backward`, so that there is no moment between the two elsewhere.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = weakref.ref(trainer)

    def before(self, engine: Any) -> None:
        """Raise FloatingPointError, on all processes alike, before anything is updated."""
        trainer = self.trainer()
        if trainer is None or engine is not trainer.model_wrapped or engine.fp16_enabled():
            return
        from deepspeed.utils import safe_get_full_grad

        trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        gradients = [safe_get_full_grad(parameter) for parameter in trained]
        finite = [gradient.isfinite().all() for gradient in gradients if gradient is not None]
        if finite and not torch.stack(finite).all():
            raise trainer.not_finite(None)

    def after(self, engine: Any, noted: Any) -> None:
        """Nothing is to be done."""


def watch(trainer: Any) -> None:
    """Keep an eye on the steps of the trainer's engine."""
    if trainer.is_deepspeed_enabled and is_imported():
        watch_steps(FiniteSteps(trainer))


class GradientArrival:
    """Whether a gradient has come to any of some parameters, whoever keeps it."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.parameters = parameters
        self.seen = False
        self.handles = [parameter.register_hook(self._note) for parameter in parameters]

    def _note(self, gradient: torch.Tensor) -> None:
        self.seen = True

    def check(self) -> bool:
        """The answer; with it the watch is over."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        return self.seen or any(parameter.grad is not None for parameter in self.parameters)
