"""The rank of one DyLoRA adapter in one layer, and the factors that belong to it.

`AdapterRanks` is the one owner of the rank: it says which rank is in use, keeps the basis of truncation="svd", and
writes what PEFT reads (`r`, `lora_alpha`, `scaling`) into the layer. A factor looks the rank up here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peft_dynamic.functional.ranks import alpha_at, bases_of, gram_matrices, leading_part, slice_rank
from peft_dynamic.hosts.offload import is_sharded
from peft_dynamic.tuners.computed import ComputedFactor
from peft_dynamic.tuners.dylora.schedule import RankSchedule
from peft_dynamic.tuners.factors import live_states
from peft_dynamic.tuners.steps import SteppedState


class RankedFactor(ComputedFactor):
    """The part of one factor that belongs to the rank in use; with a mixer, of M A, where a prefix has M[:b, :b]."""

    owner: AdapterRanks

    @property
    def rank(self) -> int:
        """How many rows of A, or columns of B, are in use; of each group of a grouped convolution."""
        return self.owner.in_use // self.divisor

    @property
    def keeps(self) -> bool:  # type: ignore[override]  # a class attribute of the base
        """A prefix is a view of the stored tensor: nothing to compute once or to keep."""
        return self.owner.truncation != "prefix" or self.mixer is not None

    def is_plain(self) -> bool:
        whole = self.owner.in_use == self.owner.max_rank and not self.owner.frozen_below
        return whole and self.mixer is None and not self.owner.rotated

    def state_key(self, full: torch.Tensor) -> tuple[Any, ...]:
        return (self.owner.in_use, self.owner.mixed_rows, *self.owner.state_key())

    def compute(self, full: torch.Tensor) -> torch.Tensor:
        rank = self.rank
        if not rank:  # PEFT knows no rank 0: one component of zeros, also where the factor holds NaN
            return torch.zeros_like(slice_rank(full, self.dim, 1, self.max_rank, self.groups))
        if self.owner.truncation == "prefix" and (self.mixer is None or self.owner.mixed_rows):
            frozen_below = self.owner.frozen_below // self.divisor
            return slice_rank(full, self.dim, rank, self.max_rank, self.groups, frozen_below)
        if rank == self.max_rank and not self.owner.rotated:
            return self.mixed(full)
        if self.owner.truncation == "svd":
            return self._leading(full, rank)
        if self.dim == 1:  # B of a prefix whose A is mixed
            return slice_rank(full, self.dim, rank, self.max_rank, self.groups)
        assert self.mixer is not None
        m = self.mixer.value[:, :rank, :rank].to(full)
        return (m @ self.matrices(full)[:, :rank]).reshape(-1, *full.shape[1:])

    def _leading(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        """The factor of the leading singular components: F[:rank] M A or B E[:, :rank], back in the factor's layout."""
        e, f = (constant.to(full.device) for constant in self.owner.basis())  # the model may have moved since
        mixer = None if self.mixer is None else self.mixer.value
        cut = leading_part(self.matrices(full), self.dim, rank, (e, f), mixer)
        if self.dim == 0:
            return cut.reshape(-1, *full.shape[1:]).to(full.dtype)
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


class AdapterRanks(SteppedState):
    """The rank state of one adapter in one layer.

    Attributes:
        max_rank: r of this layer: the config's, or what `rank_pattern` says, a cap or a multiple.
        per_rank: how many ranks the layer has for each of the adapter: above 1 for fused projections.
        in_use: the rank that the layer computes with now: `rank`, or in a training forward pass the drawn one. At 0 the
            layer shows PEFT a component of zeros, and a rank of 1.
        frozen_below: components below this one get no gradient in this forward pass.
        rank: the layer's rank at the set rank, in use everywhere but in a training forward pass.
        asked: the rank that was asked for; above `rank` where the layer is capped.
        mixed_rows: each row of the batch has a rank of its own, up to `in_use`, and `rows` of A's factor cuts to it.
    """

    parts: tuple[tuple[nn.Module, str, RankedFactor], tuple[nn.Module, str, RankedFactor]]

    def __init__(
        self,
        schedule: RankSchedule,
        truncation: str,
        rule: str,
        lora_alpha: float,
        max_rank: int,
        parts: tuple[Any, Any],
    ) -> None:
        super().__init__(schedule, parts)
        self.truncation = truncation
        self.rule = rule
        self.lora_alpha = lora_alpha
        self.max_rank = max_rank
        self.per_rank = max(1, max_rank // schedule.ranks[-1])
        self.in_use = self.rank = max_rank
        self.frozen_below = 0
        self.asked = max_rank // self.per_rank
        self.mixed_rows = False
        self._outside_training: tuple[int, float, Any] | None = None  # r, lora_alpha, scaling to go back to
        self._basis: tuple[torch.Tensor, torch.Tensor] | None = None
        self._basis_key: Any = None

    # --- the rank

    @property
    def rotated(self) -> bool:
        """Whether the factors are in the basis of the singular components even at the full rank, for rows to be cut."""
        return self.mixed_rows and self.truncation == "svd"

    def of(self, rank: int) -> int:
        """The layer's rank where the adapter has `rank`."""
        return min(rank * self.per_rank, self.max_rank)

    def use(self, layer: LoraLayer, adapter_name: str, rank: int, frozen_below: int = 0) -> None:
        """Compute with this rank of the layer from now on, and let PEFT read it in the layer."""
        self.in_use, self.frozen_below = rank, frozen_below
        shown = rank or self.parts[0][2].divisor
        layer.r[adapter_name] = shown
        layer.lora_alpha[adapter_name] = alpha_at(self.rule, self.lora_alpha, shown, self.max_rank)

    def begin_forward(self, layer: LoraLayer, adapter_name: str) -> None:
        """A training forward pass: the drawn rank holds."""
        super().begin_forward(layer, adapter_name)
        schedule = self.schedule
        if schedule.suspended or not self.is_trained():
            return
        self._outside_training = (layer.r[adapter_name], layer.lora_alpha[adapter_name], layer.scaling[adapter_name])
        multiplier = layer.scaling[adapter_name] / (layer.lora_alpha[adapter_name] / layer.r[adapter_name])
        rank = self.of(schedule.drawn)
        frozen = self.of(schedule.below(schedule.drawn)) if schedule.update == "frozen" else 0
        self.use(layer, adapter_name, rank, frozen)
        scale = layer.lora_alpha[adapter_name] / rank
        layer.scaling[adapter_name] = scale if multiplier == 1 else scale * multiplier

    def end_forward(self, layer: LoraLayer, adapter_name: str) -> None:
        super().end_forward(layer, adapter_name)
        if self._outside_training is not None:
            self.in_use, self.frozen_below = self.rank, 0
            layer.r[adapter_name], layer.lora_alpha[adapter_name], layer.scaling[adapter_name] = self._outside_training
            self._outside_training = None

    def moving_parts(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """For both factors, whose values these are: the mask of what this step trains under update="frozen"."""
        stop = self.of(self.schedule.drawn)
        start = self.of(self.schedule.below(self.schedule.drawn))
        return [factor.block_mask(value, start, stop) for value, (_, _, factor) in zip(values, self.parts, strict=True)]

    @classmethod
    def prepare_next(cls, states: list[AdapterRanks]) -> None:
        """The rank that comes next is the drawn one or the set one; at rank 0 a layer needs no basis."""
        prepare((each, min(each.of(each.schedule.drawn), each.rank or each.max_rank)) for each in states)

    # --- the basis of truncation="svd"

    def basis(self) -> tuple[torch.Tensor, torch.Tensor]:
        """E and F of `leading_components` for the factors as they are now."""
        if self._basis is not None and torch.compiler.is_compiling():
            return self._basis  # kept up to date outside the graph: see prepare
        return self._current_basis()

    def state_key(self) -> tuple[int, ...]:
        """Changes whenever the factors do; the step counter is for optimizers that bypass torch's version counters."""
        (holder_a, name_a, factor_a), (holder_b, name_b, _) = self.parts
        # Asked for at every look at a factor, where decoding one token at a time feels it: no function calls here.
        a: torch.Tensor | None = holder_a._parameters.get(name_a)
        b: torch.Tensor | None = holder_b._parameters.get(name_b)
        if a is None or b is None:
            a, b = self.factors()
        key = (self.schedule.updates, id(a), a._version, id(b), b._version)
        mixer = factor_a.mixer
        return key if mixer is None else (*key, id(mixer.value), mixer.value._version)

    @torch.compiler.disable
    def _current_basis(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_out_of_date():
            self.check_gathered(self.factors())
            if any(is_sharded(factor) for factor in self.factors()):
                raise RuntimeError(
                    "truncation='svd' needs both factors of a layer at once, and FSDP2 has not gathered both. In a "
                    "pass: wrap whole transformer blocks, not single linear layers, or use truncation='prefix'. "
                    "Outside of one: save the adapter with trainer.save_model, and load or export what it wrote."
                )
            find_bases([self])
        assert self._basis is not None
        return self._basis

    def is_out_of_date(self) -> bool:
        return self._basis is None or self.state_key() != self._basis_key or self.has_changed()

    def grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K_A and K_B, (n, r, r) each: what a calibration measured, or else those of the weights alone."""
        measured = self.schedule.current_moments()
        return self.plain_grams() if measured is None else self._part_of(measured)

    def _part_of(self, measured: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layers = layers_of(self.schedule)
        sizes = [2 * each.gram_shape.numel() for each in layers]
        if sum(sizes) != len(measured):
            raise ValueError(
                f"the adapter holds moments of {len(measured)} numbers, and its {len(layers)} layers need "
                f"{sum(sizes)}: it was calibrated with other target_modules or ranks. Call calibrate again."
            )
        place = next(i for i, each in enumerate(layers) if each.order == self.order)
        part = measured.split(sizes)[place].to(self.factors()[0].device).double()
        gram_a, gram_b = part.view(2, *self.gram_shape)
        return gram_a, gram_b

    @property
    def gram_shape(self) -> torch.Size:
        """(n, r, r), with n the number of experts or groups."""
        factor_a = self.parts[0][2]
        return torch.Size((factor_a.groups[0], factor_a.max_rank, factor_a.max_rank))

    def plain_grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, r, r) each: M A A^T M^T and B^T B."""
        a, b = self.factors()
        (_, _, factor_a), (_, _, factor_b) = self.parts
        mixer = factor_a.mixer
        return gram_matrices(factor_a.matrices(a), factor_b.matrices(b), None if mixer is None else mixer.value)

    def keep_basis(self, e: torch.Tensor, f: torch.Tensor) -> None:
        dtype = torch.promote_types(self.factors()[0].dtype, torch.float32)
        self._basis = (e.to(dtype), f.to(dtype))
        self._basis_key = self.state_key()
        self._seen = None  # its versions may be the old ones
        self.remember()

    def forget(self) -> None:
        super().forget()
        self.forget_basis()

    def forget_basis(self) -> None:
        """The factors may have changed without a sign."""
        self._basis = self._basis_key = self._seen = None

    def wants_basis(self, rank: int) -> bool:
        at_hand = not any(is_sharded(factor) or factor.device.type == "meta" for factor in self.factors())
        return self.truncation == "svd" and 0 < rank < self.max_rank and at_hand

    def __setstate__(self, state: dict[str, Any]) -> None:  # a deep copy or an unpickled one
        super().__setstate__(state)
        self.forget()


def layers_of(schedule: RankSchedule) -> list[AdapterRanks]:
    """The layers of an adapter, in the order of their making, which is that of the model."""
    states = (state for state in live_states() if isinstance(state, AdapterRanks) and state.schedule is schedule)
    return sorted(states, key=lambda state: state.order)


def prepare(many: Iterable[tuple[AdapterRanks, int]]) -> None:
    """Each layer's rank comes next: make the bases for it that are out of date, which a compiled pass could not."""
    find_bases(ranks for ranks, rank in many if ranks.wants_basis(rank) and ranks.is_out_of_date())


@torch.compiler.disable
def find_bases(many: Iterable[AdapterRanks]) -> None:
    """The bases of all these layers, those of equal r in one batch: a step has one eigenproblem, not one per layer."""
    # Ordinary tensors even from an evaluation under inference_mode: training may use them next.
    with torch.inference_mode(False), torch.no_grad():
        alike: dict[Any, list[tuple[AdapterRanks, torch.Tensor, torch.Tensor]]] = {}
        for ranks in many:
            gram_a, gram_b = ranks.grams()
            check_finite(ranks, gram_a, gram_b)
            alike.setdefault((gram_a.shape[-1], gram_a.device), []).append((ranks, gram_a, gram_b))
        for group in alike.values():
            sizes = [len(gram_a) for _, gram_a, _ in group]
            e, f = bases_of(
                torch.cat([gram_a for _, gram_a, _ in group]), torch.cat([gram_b for _, _, gram_b in group])
            )
            for (ranks, _, _), e_part, f_part in zip(group, e.split(sizes), f.split(sizes), strict=True):
                ranks.keep_basis(e_part, f_part)


def check_finite(ranks: AdapterRanks, gram_a: torch.Tensor, gram_b: torch.Tensor) -> None:
    """Raise RuntimeError for factors that hold NaN or infinite values."""
    for name, gram in (("lora_A", gram_a), ("lora_B", gram_b)):
        if not gram.isfinite().all():
            what = "NaN" if gram.isnan().any() else "infinite values"
            raise RuntimeError(
                f"{name} of {ranks.name or 'a layer'} holds {what} after optimizer step {ranks.schedule.steps} and has "
                "no leading components. The training has diverged: go back to a checkpoint before, lower the learning "
                "rate, clip the gradients, or look for NaN in the loss."
            )
