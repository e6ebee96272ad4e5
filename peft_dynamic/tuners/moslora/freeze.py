"""LaMDA's freezing: the columns of B stand still one after another, in the order of the weight's singular values."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dynamic.hosts.deepspeed import is_of_zero3
from peft_dynamic.tuners.computed import ComputedFactor
from peft_dynamic.tuners.factors import LayerState
from peft_dynamic.tuners.steps import SteppedState, StepSchedule


class FreezeSchedule(StepSchedule):
    """How many columns of B stand still: min(r, floor(r i / (share N))) after i of N optimizer steps.

    Args:
        share: eta of LaMDA, above 0.
        total: N; None until `expect_steps` says it.

    Source: Azizi, Kundu, Pedram, Findings of EMNLP 2024, arXiv 2406.12832. Their code counts to 3 of 64 columns, and
    AdamW's momentum and decay move those on; here all are frozen, to the bit.
    """

    method, field, instead = "LaMDA", "freeze_b", "pass freeze_b=None"
    holds_still = True

    def __init__(self, share: float, total: int | None) -> None:
        super().__init__()
        self.share, self.total, self.is_given = share, total, total is not None
        self._masks: dict[tuple[int, torch.device], torch.Tensor] = {}
        self.arrive()

    def frozen(self, rank: int) -> int:
        """How many of `rank` columns stand still in the step that comes next."""
        if self.total is None:
            return 0
        return min(rank, floor(rank * self._steps / (Fraction(str(self.share)) * self.total)))

    def moving(self, rank: int, device: torch.device) -> torch.Tensor:
        """(rank,) bool: the columns that are trained. Kept, and written to at each step: a compiled pass reads it."""
        found = self._masks.get((rank, device))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = torch.arange(rank, device=device) >= self.frozen(rank)
            self._masks[rank, device] = found
        return found

    def arrive(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for (rank, device), mask in self._masks.items():
                mask.copy_(torch.arange(rank, device=device) >= self.frozen(rank))

    def expect_steps(self, total: int) -> None:
        """A trainer says how many steps it will take; what the configuration says goes before."""
        if not self.is_given:
            self.total = total
            self.arrive()

    def enter_training(self) -> None:
        """A forward pass that is trained on begins.

        Raises:
            RuntimeError: nobody has said how many steps there will be.
        """
        if self.total is None:
            raise RuntimeError(
                f"freeze_b={self.share} is a share of all optimizer steps, and nobody has said how many there will be. "
                "Pass total_steps to the configuration, or train with transformers' Trainer or one of TRL's that is "
                "made of it, which tells them. Nothing has been trained."
            )
        super().enter_training()

    @property
    def unmoved(self) -> str:
        return f"{self.frozen(1000) / 10:g} % of B's columns would stand still for good"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()  # a compiled pass would not


class FreezingFactor(ComputedFactor):
    """B M, of whose columns some get no gradient."""

    def compute(self, full: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            moving = self.owner.schedule.moving(self.max_rank, full.device)
            full = torch.where(moving, full, full.detach())
        return super().compute(full)


def check_kept(state: LayerState) -> None:
    """Raise RuntimeError for a frozen factor that ZeRO-3 has in parts: Trainer would leave it out of what it saves."""
    if any(is_of_zero3(factor) and not factor.requires_grad for factor in state.stored()):
        raise RuntimeError(
            f"DeepSpeed ZeRO-3 holds {state.name or 'a layer'} in parts, and Trainer saves of those the trained ones "
            "alone: train_a=False leaves lora_A out, and the checkpoint could not be loaded. Use ZeRO-1, ZeRO-2, DDP "
            "or FSDP2. Nothing has been trained."
        )


class StillState(LayerState):
    """An adapter in a layer, whose A is never trained, or neither factor."""

    def begin_forward(self, layer: LoraLayer, adapter_name: str) -> None:
        check_kept(self)
        super().begin_forward(layer, adapter_name)


class FreezingState(SteppedState):
    """An adapter in a layer, of whose B the leading columns stand still, and A whole."""

    def begin_forward(self, layer: LoraLayer, adapter_name: str) -> None:
        check_kept(self)
        super().begin_forward(layer, adapter_name)

    def moving_parts(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        a, b = values
        moving = self.schedule.moving(self.parts[1][2].max_rank, b.device)
        return [torch.zeros(a.shape, dtype=torch.bool, device=a.device), moving.expand(b.shape).contiguous()]


def check_linear(layer: LoraLayer, adapter_name: str, why: str) -> None:
    """Raise ValueError unless the layer is a linear one, whose weight can be read."""
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear | Conv1D) or type(getattr(layer.lora_A, adapter_name, None)) is not nn.Linear:
        raise ValueError(
            f"MoSLoRA with {why} is for linear layers, quantised by bitsandbytes or not, and {type(base).__name__} "
            f"({type(layer).__name__}) is none. Leave the layer out of target_modules."
        )


def start_spectral(layer: Any, adapter_name: str) -> None:
    """A and B become the leading singular vectors of the layer's weight, each with its largest entry of A above 0.

    Raises:
        ValueError: the weight has fewer than r, or holds NaN.
    """
    a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if is_of_zero3(layer.get_base_layer().weight):
        raise ValueError(
            "init_lora_weights='spectral' reads each weight whole, and DeepSpeed ZeRO-3 has loaded the base model in "
            "parts. Make the adapter before the TrainingArguments, or use ZeRO-1, ZeRO-2, DDP or FSDP2."
        )
    weight = dequantize_module_weight(layer.get_base_layer())
    if "meta" in (a.device.type, weight.device.type):  # with low_cpu_mem_usage, until a checkpoint is loaded
        return
    weight = (weight.T if layer.fan_in_fan_out else weight).detach().float()
    rank = len(a)
    if rank > min(weight.shape):
        raise ValueError(
            f"r={rank}: init_lora_weights='spectral' takes as many singular vectors, and a weight of shape "
            f"{tuple(weight.shape)} has {min(weight.shape)}. Lower r, or that of the module in rank_pattern."
        )
    if not weight.isfinite().all():
        raise ValueError(
            "init_lora_weights='spectral' reads the singular vectors of each weight, and one holds NaN or infinite "
            "values. Load another base model."
        )
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    u, vh = u[:, :rank], vh[:rank]
    signs = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()  # of two equal pairs of vectors always the same
    with torch.no_grad():
        a.copy_(signs * vh)
        b.copy_(signs.T * u)
