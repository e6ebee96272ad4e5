"""What a factor shows at a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peft_dynamic.functional.ranks import slice_rank
from peft_dynamic.tuners.factors import FactorView

if TYPE_CHECKING:
    from peft_dynamic.tuners.dylora.layer import AdapterRanks


class RankView(FactorView):
    """The part of one factor that belongs to the rank in use; with a mixer, of M A, where a prefix has M[:b, :b]."""

    owner: AdapterRanks
    rank: int
    frozen_below = 0

    def show(self, rank: int, frozen_below: int = 0) -> None:
        self.rank = rank // self.divisor
        self.frozen_below = frozen_below // self.divisor

    def is_plain(self) -> bool:
        return self.mixer is None and self.rank == self.max_rank and not self.frozen_below

    def state_key(self, full: torch.Tensor) -> tuple[Any, ...]:
        return (self.rank, *self.owner.state_key())

    def of(self, full: torch.Tensor) -> torch.Tensor:
        if self.owner.truncation == "prefix" and self.mixer is None:
            # a view of the stored tensor: nothing to compute once or to keep
            return slice_rank(full, self.dim, self.rank, self.max_rank, self.groups, self.frozen_below)
        return super().of(full)

    def compute(self, full: torch.Tensor) -> torch.Tensor:
        if self.rank == self.max_rank:
            return self.mixed(full)
        if self.owner.truncation == "svd":
            return self._leading(full)
        if self.mixer is None:  # B of a prefix whose A is mixed
            return slice_rank(full, self.dim, self.rank, self.max_rank, self.groups)
        m = self.mixer.value[:, : self.rank, : self.rank].to(full)
        return (m @ self.matrices(full)[:, : self.rank]).reshape(-1, *full.shape[1:])

    def _leading(self, full: torch.Tensor) -> torch.Tensor:
        """The factor of the leading singular components: F[:rank] M A or B E[:, :rank], back in the factor's layout."""
        e, f = (constant.to(full.device) for constant in self.owner.basis())  # the model may have moved since
        matrices = self.matrices(full).to(e.dtype)
        if self.dim == 0:
            leading = f[:, : self.rank] if self.mixer is None else f[:, : self.rank] @ self.mixer.value.to(f)
            return (leading @ matrices).reshape(-1, *full.shape[1:]).to(full.dtype)
        cut = matrices @ e[:, :, : self.rank]
        if self.groups[1] > 1:
            cut = cut.permute(1, 2, 0)
        return cut.reshape(full.shape[0], -1, *full.shape[2:]).to(full.dtype)

    def block_mask(self, full: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Bool tensor of `full`'s shape: True at the components start..stop-1."""
        mask = torch.zeros(full.shape, dtype=torch.bool, device=full.device)
        outer, inner = self.groups
        parts = mask.unflatten(self.dim, (outer, self.max_rank, inner))
        parts.narrow(self.dim + 1, start // self.divisor, (stop - start) // self.divisor).fill_(True)
        return mask
