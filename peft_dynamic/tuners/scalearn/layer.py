"""What a ScaLearn layer has: omega, and a B that is computed with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from peft_dynamic.functional.scales import scale_columns
from peft_dynamic.hosts.offload import real, whole
from peft_dynamic.tuners.computed import ComputedFactor, Part, stored_factor
from peft_dynamic.tuners.factors import LayerState


class Scales(nn.Module):
    """Omega, as `weight` of shape (T, out) or (T, 1): of one layer, or of all.

    Args:
        weight: its start.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    @property
    def value(self) -> torch.Tensor:
        """`weight`, from where a host has put it: no forward pass of this module fetches it."""
        found = whole(real(self, "weight", self.weight))
        assert found is not None
        return found


class SourceState(LayerState):
    """The stacked factors of the sources in one layer: they are never trained.

    Args:
        parts: as in `LayerState`.
        scales: omega.
        unread: the configuration was loaded, so that the factors are NaN until its tensors are. Zeros would compute
            the base model, and nobody would know.

    Attributes:
        dtype: that PEFT made the factors in, the base model's; None with low_cpu_mem_usage, where it is the file's.
    """

    frozen = True

    def __init__(self, parts: tuple[Part, Part], scales: Scales, unread: bool) -> None:
        super().__init__(parts)
        self.scales, self.unread = scales, unread
        b = self.factors()[1]
        self.dtype = None if b.device.type == "meta" else b.dtype
        if unread:
            stored_factor(*parts[1][:2]).data.fill_(torch.nan)

    def begin_forward(self, layer: Any, adapter_name: str) -> None:
        if self.unread and not torch.compiler.is_compiling():
            if bool(self.factors()[1].isnan().any()):
                raise RuntimeError(
                    f"the adapter {adapter_name!r} has none of its sources at {self.name!r}: its configuration was "
                    "loaded without its tensors. Load it with PeftModel.from_pretrained, or make a ScaLearnConfig from "
                    "the sources anew."
                )
            self.unread = False
        super().begin_forward(layer, adapter_name)


class ScaledFactor(ComputedFactor):
    """B' of equation (2) in `functional.scales`, from the stacked B.

    Args:
        max_rank, groups, divisor: as in `ComputedFactor`.
        scales: omega.
        rows: row of omega -> rank, of each source in this layer, in the order of B's columns.
        dropout: probability with which an entry of omega is dropped in a training pass.
    """

    def __init__(
        self,
        max_rank: int,
        groups: tuple[int, int],
        divisor: int,
        scales: Scales,
        rows: dict[int, int],
        dropout: float,
    ) -> None:
        super().__init__(1, max_rank, groups, divisor)
        self.scales = scales
        self.of_rows = rows
        self.dropout = dropout

    @property
    def drops(self) -> bool:
        """Whether this is a training pass, in which entries of omega are dropped."""
        return self.dropout > 0 and self.owner.in_forward

    def is_plain(self) -> bool:
        return False

    def compute(self, full: torch.Tensor) -> torch.Tensor:
        omega = self.scales.value
        if len(omega) > len(self.of_rows):  # one omega for all layers, and this one lacks a source
            omega = omega[[*self.of_rows]]
        if self.drops:
            omega = functional.dropout(omega, self.dropout)
        return scale_columns(full, omega, [*self.of_rows.values()], self.groups[1])

    def state_key(self, full: torch.Tensor) -> tuple[Any, ...]:
        omega = self.scales.value
        return (id(full), full._version, id(omega), omega._version, self.drops)

    def sources(self, full: torch.Tensor) -> list[torch.Tensor]:
        return [full, self.scales.value]
