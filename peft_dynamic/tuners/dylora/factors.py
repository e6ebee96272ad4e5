"""LoRA factors that show the part of themselves that belongs to a rank; the whole stays where torch looks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft_dynamic.functional.ranks import slice_rank

if TYPE_CHECKING:
    from .layer import AdapterRanks


class RankView:
    """How one factor is cut to a rank.

    Args:
        dim: where the rank lies in the factor: 0 for A, 1 for B.
        max_rank: r of the layer.
        groups: (outer, inner) as in `slice_rank`.
        divisor: a grouped convolution has `1 / divisor` of the rank in each group.
    """

    owner: AdapterRanks

    def __init__(self, dim: int, max_rank: int, groups: tuple[int, int] = (1, 1), divisor: int = 1) -> None:
        self.dim = dim
        self.max_rank = max_rank // divisor
        self.groups = groups
        self.divisor = divisor
        self.rank = self.max_rank
        self.frozen_below = 0
        self.kept: tuple[Any, torch.Tensor] | None = None  # (state, the cut factor) of the last inference

    def show(self, rank: int, frozen_below: int = 0) -> None:
        self.rank = rank // self.divisor
        self.frozen_below = frozen_below // self.divisor

    def of(self, full: torch.Tensor) -> torch.Tensor:
        if self.rank == self.max_rank and not self.frozen_below:
            return full
        if self.owner.truncation == "prefix":
            return slice_rank(full, self.dim, self.rank, self.max_rank, self.groups, self.frozen_below)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._leading(full, self.owner.basis())
        key = (self.rank, *self.owner.state_key())
        if self.kept is None or self.kept[0] != key:  # inference: cut once, not in every forward pass
            self.kept = (key, self._leading(full, self.owner.basis()))
        return self.kept[1]

    def _leading(self, full: torch.Tensor, e_and_f: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The factor of the leading singular components: F[:rank] A or B E[:, :rank], back in the factor's layout."""
        e, f = e_and_f[0].to(full.device), e_and_f[1].to(full.device)  # the model may have moved since
        matrices = self.matrices(full).to(e.dtype)
        if self.dim == 0:
            cut = f[:, : self.rank] @ matrices
            return cut.reshape(-1, *full.shape[1:]).to(full.dtype)
        cut = matrices @ e[:, :, : self.rank]
        if self.groups[1] > 1:
            cut = cut.permute(1, 2, 0)
        return cut.reshape(full.shape[0], -1, *full.shape[2:]).to(full.dtype)

    def matrices(self, full: torch.Tensor) -> torch.Tensor:
        """The factor as matrices: (n, r, in) for A, (n, out, r) for B, n the number of experts or groups."""
        if self.dim == 0:
            return full.reshape(self.groups[0], self.max_rank, -1)
        if self.groups[1] > 1:
            return full.reshape(full.shape[0], self.max_rank, self.groups[1]).permute(2, 0, 1)
        return full.reshape(self.divisor, -1, self.max_rank)

    def block_mask(self, full: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Bool tensor of `full`'s shape: True at the components start..stop-1."""
        mask = torch.zeros(full.shape, dtype=torch.bool, device=full.device)
        outer, inner = self.groups
        parts = mask.unflatten(self.dim, (outer, self.max_rank, inner))
        parts.narrow(self.dim + 1, start // self.divisor, (stop - start) // self.divisor).fill_(True)
        return mask


class _RankedModule(nn.Module):
    """A LoRA factor whose `weight` is what its `rank_view` makes of the parameter."""

    rank_view: RankView

    @property
    def weight(self) -> torch.Tensor:
        full = self._parameters.get("weight")
        if full is None and (full := self.__dict__.get("weight")) is None:
            raise AttributeError("weight")
        return self.rank_view.of(full)

    # FSDP1 takes the parameter out and puts plain tensors in its place.
    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    # Two ways to change the parameter that no version counter shows for sure.
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.rank_view.owner.forget_basis()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # .to(), .half(), .cuda()
        super()._apply(*args, **kwargs)
        self.rank_view.owner.forget_basis()
        return self


def whole_factor(holder: nn.Module, name: str) -> torch.Tensor:
    """The factor at full rank: the parameter, or the tensor that FSDP1 put in its place."""
    parameter = holder._parameters.get(name)
    return parameter if parameter is not None else holder.__dict__.get(name)  # type: ignore[return-value]


class RankedLinear(_RankedModule, nn.Linear):
    """`nn.Linear` cut to a rank."""


class RankedConv1d(_RankedModule, nn.Conv1d):
    """`nn.Conv1d` cut to a rank."""


class RankedConv2d(_RankedModule, nn.Conv2d):
    """`nn.Conv2d` cut to a rank."""


class RankedConv3d(_RankedModule, nn.Conv3d):
    """`nn.Conv3d` cut to a rank."""


RANKED_CLASSES: dict[type[nn.Module], type[_RankedModule]] = {
    nn.Linear: RankedLinear,
    nn.Conv1d: RankedConv1d,
    nn.Conv2d: RankedConv2d,
    nn.Conv3d: RankedConv3d,
}


class RankedParameterDict(nn.ParameterDict):
    """Embedding factors: `factors[name]` is the part in use; `items()` and `values()` are the whole parameters."""

    rank_views: dict[str, RankView]

    def whole(self, key: str) -> nn.Parameter:
        return super().__getitem__(key)

    def __getitem__(self, key: str) -> Any:
        view = self.rank_views.get(key)
        return self.whole(key) if view is None else view.of(self.whole(key))

    def __setitem__(self, key: str, parameter: Any) -> None:
        if key in self.rank_views and parameter.shape != self.whole(key).shape:
            raise ValueError(
                f"the adapter {key!r} holds a factor of shape {tuple(self.whole(key).shape)}, got one of shape "
                f"{tuple(parameter.shape)}: set the full rank with set_rank before replacing it."
            )
        super().__setitem__(key, parameter)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.rank_views.pop(key, None)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for view in self.rank_views.values():
            view.owner.forget_basis()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        for view in self.rank_views.values():
            view.owner.forget_basis()
        return self

    # PEFT sets requires_grad through these two, which only a whole parameter allows.
    def items(self) -> Any:
        return ((key, self.whole(key)) for key in self.keys())

    def values(self) -> Any:
        return (self.whole(key) for key in self.keys())
