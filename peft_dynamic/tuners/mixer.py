"""MoSLoRA's mixer: the r x r matrix between the two LoRA factors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft_dynamic.hosts.offload import real

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer

MIXER_INITS = ("kaiming", "orthogonal", "identity", "butterfly")
ZERO = "zero"  # where neither A nor B starts at 0
SPECTRAL = "spectral"  # the `init_lora_weights` for which that holds


@dataclass
class MixerConfig:
    """The fields of a configuration that has a mixer."""

    mixer_init: str = field(
        default="kaiming",
        metadata={"help": "Start of the mixer: 'kaiming', 'orthogonal', 'identity' or 'butterfly'."},
    )
    train_mixer: bool | None = field(
        default=None,
        metadata={"help": "Whether the mixer is trained; None for yes, but for 'butterfly', which is a fixed pattern."},
    )

    @property
    def mixer_is_trained(self) -> bool:
        """`train_mixer`, or its default for this `mixer_init`."""
        return self.mixer_init != "butterfly" if self.train_mixer is None else self.train_mixer

    def _check_mixer(self, ranks: list[int]) -> None:
        """Raise unless there can be such a mixer at each of these ranks."""
        name = type(self).__name__
        zero_trains = self.mixer_init == ZERO and getattr(self, "init_lora_weights", None) == SPECTRAL
        if self.mixer_init in (ZERO, "zeros") and not zero_trains:
            raise ValueError(
                f"{name}: mixer_init={self.mixer_init!r} never trains: with B = 0 and M = 0 every gradient is 0. "
                f"Pass one of {list(MIXER_INITS)}."
            )
        if self.mixer_init not in MIXER_INITS and not zero_trains:
            raise ValueError(f"{name}: mixer_init must be one of {list(MIXER_INITS)}, got {self.mixer_init!r}.")
        if self.train_mixer is not None and not isinstance(self.train_mixer, bool):
            raise TypeError(f"{name}: train_mixer must be True, False or None, got {self.train_mixer!r}.")
        if getattr(self, "ensure_weight_tying", False):
            raise ValueError(
                f"{name} does not support ensure_weight_tying=True with a mixer: tied layers share A and B, and each "
                "has a mixer of its own, so that their updates would differ. Leave one of them out of target_modules."
            )
        odd = [rank for rank in ranks if rank % 2]
        if self.mixer_init == "butterfly" and odd:
            raise ValueError(
                f"{name}: mixer_init='butterfly' mixes two halves of the rank, so each rank must be even; got {odd}. "
                "Pass even ranks in r and rank_pattern, or another mixer_init."
            )


class Mixer(nn.Module):
    """M, as `weight` of shape (n, r, r): one matrix, or one per expert or group of the layer.

    Args:
        n: number of matrices.
        rank: r of each.
        config: `mixer_init` and whether it is trained; an untrained one is a buffer, saved and loaded all the same.
        like: a factor of the layer, for dtype and device.

    Source: Wu, Wang, Zhao, Wong: Mixture-of-Subspaces in Low-Rank Adaptation, EMNLP 2024, arXiv 2406.11909.
    """

    weight: torch.Tensor

    def __init__(self, n: int, rank: int, config: MixerConfig, like: torch.Tensor) -> None:
        super().__init__()
        weight = torch.empty(n, rank, rank, dtype=torch.float32, device=like.device)
        if like.device.type != "meta":  # there with low_cpu_mem_usage, until a checkpoint is loaded
            for matrix in weight:
                _initialize(matrix, config.mixer_init)
        weight = weight.to(like.dtype)
        if config.mixer_is_trained:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    @property
    def value(self) -> torch.Tensor:
        """`weight`, from where accelerate has put it if it is offloaded: no forward pass of this module fetches it."""
        return real(self, "weight", self.weight)


def _initialize(matrix: torch.Tensor, how: str) -> None:
    rank = len(matrix)
    if how == "kaiming":
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))  # U(-1, 1) / sqrt(r), as the authors' code
    elif how == "orthogonal":
        nn.init.orthogonal_(matrix)
    elif how == "identity":
        nn.init.eye_(matrix)
    elif how == ZERO:
        nn.init.zeros_(matrix)
    else:  # two subspaces mixed: [[I, I], [I, I]]
        matrix.copy_(torch.eye(rank // 2).repeat(2, 2))


def add_mixer(layer: LoraLayer, adapter_name: str, config: Any, groups: int, rank: int) -> Mixer | None:
    """Give the adapter in this layer a mixer, as a module that PEFT saves, moves and deletes with the factors.

    None where M stays the identity: that is plain LoRA, to the bit.
    """
    if config.mixer_init == "identity" and not config.mixer_is_trained:
        return None
    factor = layer.lora_A[adapter_name].weight if adapter_name in layer.lora_A else layer.lora_embedding_A[adapter_name]
    if not hasattr(layer, "lora_mixer"):
        layer.lora_mixer = nn.ModuleDict()
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_mixer")
    layer.lora_mixer[adapter_name] = Mixer(groups, rank, config, factor)
    return layer.lora_mixer[adapter_name]
