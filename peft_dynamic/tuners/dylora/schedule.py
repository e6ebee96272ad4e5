"""Which rank a training step uses: drawn once per optimizer step, the same everywhere, continued after a resume.

Notable: nothing has to be called. torch tells us of every optimizer step (a global hook), so plain loops, Trainer,
SFTTrainer, gradient accumulation and a GradScaler that skips a step all count the same thing. The draw happens there,
not in a forward pass: a forward pass may be repeated (gradient checkpointing, accumulation) or compiled.
"""

from __future__ import annotations

import threading
import warnings
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peft_dynamic.functional.ranks import draw_rank, rank_weights
from peft_dynamic.tuners.dylora.bases import prepare
from peft_dynamic.tuners.dylora.turns import turns_of

if TYPE_CHECKING:
    from peft_dynamic.tuners.dylora.config import DyLoRAConfig
    from peft_dynamic.tuners.dylora.layer import AdapterRanks


class RankSchedule(nn.Module):
    """The rank draws of one adapter, shared by all its layers.

    The number of optimizer steps is a buffer (`step`, int64, shape ()), so that it travels with the adapter's
    checkpoint: `resume_from_checkpoint` and `load_adapter` continue the sequence of ranks where it stopped.

    Attributes:
        drawn: the rank of the current training step.
    """

    step: torch.Tensor

    def __init__(self, config: DyLoRAConfig) -> None:
        super().__init__()
        self.ranks = config.trained_ranks
        self.weights = rank_weights(self.ranks, config.rank_sampling, config.geometric_p)
        self.seed = config.rank_seed
        self.update = config.update
        self.warned: set[int] = set()
        self._entered_training = False
        self._unseen_steps = 0  # steps of optimizers without our factors, as long as none with them was seen
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device="cpu"))
        self._seen: tuple[int, int] | None = None
        self._steps = 0
        self.updates = 0  # optimizer steps seen by this process, never set back
        self.drawn = self._draw()

    @property
    def steps(self) -> int:
        """How many optimizer steps were taken, before a resume too."""
        return self._steps

    def _draw(self) -> int:
        return draw_rank(self.ranks, self.weights, self.seed, self._steps)

    def refresh(self) -> None:
        """Take over a step number that was loaded from a checkpoint."""
        seen = (id(self.step), self.step._version)
        if seen != self._seen:  # reading the number is a device synchronisation: only when the buffer has changed
            self._seen, self._steps = seen, int(self.step)
            self.drawn = self._draw()

    def advance(self) -> None:
        """One optimizer step has been taken: draw the next rank."""
        self.refresh()
        self._steps += 1
        self.updates += 1
        with torch.no_grad():
            self.step.fill_(self._steps)
        self._seen = (id(self.step), self.step._version)
        self.drawn = self._draw()

    def count_foreign_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn when training goes on and no optimizer that steps holds the factors: their rank would never change."""
        if self.updates or not self._entered_training:
            return
        self._entered_training = False  # so that another model's steps do not count against one that stands still
        self._unseen_steps += 1
        if self._unseen_steps == 3:
            warnings.warn(
                f"{type(optimizer).__name__} has stepped 3 times and holds none of the DyLoRA adapter's factors, so "
                f"the adapter still trains its first rank, {self.drawn}. Optimizers over copies or flat buffers of the "
                "parameters (DeepSpeed ZeRO, FSDP1 with use_orig_params=False) are not supported: use DDP or FSDP2.",
                stacklevel=3,
            )

    def _refuse_deepspeed(self) -> None:
        """Raise where DeepSpeed has the factors: it steps over flat buffers, and no hook of torch sees that."""
        for ranks in _live():
            if ranks.schedule is not self:
                continue
            if any(hasattr(factor, mark) for factor in ranks.factors() for mark in ("_hp_mapping", "ds_id")):
                raise RuntimeError(
                    "DeepSpeed ZeRO steps over flat copies of the factors of this DyLoRA adapter, so that its steps "
                    f"cannot be counted: every step would train rank {self.drawn}. Use DDP or FSDP2."
                )
            return

    def below(self, rank: int) -> int:
        """The next smaller trained rank, 0 below the smallest."""
        below = 0
        for trained in self.ranks:
            if trained < rank:
                below = trained
        return below

    @property
    def suspended(self) -> bool:
        """Whether the model runs without gradients (generation in train mode): nothing is sampled then."""
        # Not asked of the layer: reentrant checkpointing runs the layers of a training step without gradients.
        return not torch.is_grad_enabled() if torch.compiler.is_compiling() else turns_of(self).without_gradients()

    def enter_model(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the whole model."""
        if torch.compiler.is_compiling():
            return
        trains = module.training and torch.is_grad_enabled()
        if trains and not self.updates:
            self._refuse_deepspeed()
        turns_of(self).enter_call(trains)
        if torch.is_grad_enabled():
            self.refresh()
        self._entered_training = self._entered_training or trains

    def leave_model(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the whole model; runs after an `Exception` too, and after nothing else that is raised."""
        if not torch.compiler.is_compiling():
            turns_of(self).leave_call()


# Every (layer, adapter) alive. Weak, and filled when one is made, copied or unpickled: a copied model's schedule
# follows the copy's optimizer.
LIVE_RANKS: WeakSet[AdapterRanks] = WeakSet()
_live_lock = threading.Lock()
_before_step: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}


def enlist(ranks: AdapterRanks) -> None:
    """Add one to `LIVE_RANKS`."""
    with _live_lock:
        LIVE_RANKS.add(ranks)


def _live() -> list[AdapterRanks]:
    with _live_lock:  # another thread may be making a model
        return list(LIVE_RANKS)


def _stepped(optimizer: torch.optim.Optimizer) -> list[AdapterRanks]:
    """Those whose factors the optimizer holds."""
    if not LIVE_RANKS:
        return []
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [ranks for ranks in _live() if any(id(factor) in held for factor in ranks.factors())]


def _distribute_like(mask: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not hasattr(parameter, "placements"):
        return mask
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _led(optimizer: torch.optim.Optimizer, stepped: list[AdapterRanks]) -> set[RankSchedule]:
    """The schedules whose step this is: of several optimizers over one adapter that with its first factor counts."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    ours = {ranks.schedule for ranks in stepped}
    first: dict[RankSchedule, bool] = {}
    for ranks in sorted(_live(), key=lambda ranks: ranks.order):
        trained = [factor for factor in ranks.factors() if factor.requires_grad]
        if trained and ranks.schedule in ours:
            first.setdefault(ranks.schedule, id(trained[0]) in held)
    return {schedule for schedule, mine in first.items() if mine}


def _check_whole(optimizer: torch.optim.Optimizer, stepped: list[AdapterRanks]) -> None:
    """Refuse update="frozen" over several optimizers: the first one's step would draw the next rank for the others."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    frozen = {ranks.schedule for ranks in stepped if ranks.schedule.update == "frozen"}
    for ranks in _live() if frozen else ():
        if ranks.schedule in frozen and any(p.requires_grad and id(p) not in held for p in ranks.factors()):
            raise RuntimeError(
                f"update='frozen' trains one block of all factors in a step, and {type(optimizer).__name__} holds a "
                f"part of them only: {ranks.name or 'a layer'} is not in it. Put all lora_A and lora_B into one "
                "optimizer (in groups, where they differ), freeze the others, or use update='nested'. Nothing has been "
                "updated."
            )


def _keep_frozen(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before an optimizer step: remember the components that update="frozen" must not move."""
    saved = []
    stepped = _stepped(optimizer)
    _check_whole(optimizer, stepped)
    for ranks in stepped:
        if ranks.schedule.update == "frozen":
            for factor, mask in ranks.moving_parts():
                saved.append((factor, factor.detach().clone(), _distribute_like(mask, factor)))
    _before_step[id(optimizer)] = saved


def _was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler found an overflow and left the skipping to the optimizer, as it does to fused ones."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.any())


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After an optimizer step: put frozen components back and draw the next rank."""
    stepped = _stepped(optimizer)
    if stepped and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{type(optimizer).__name__} stepped inside backward (a layer-wise optimizer). DyLoRA draws one rank per "
            "optimizer step, and a backward pass must finish at the rank it began with. Use an optimizer that steps "
            "after backward."
        )
    with torch.no_grad():
        for factor, before, moving in _before_step.pop(id(optimizer), []):
            factor.copy_(torch.where(moving, factor, before))
    if stepped and not _was_skipped(optimizer):
        for schedule in _led(optimizer, stepped):
            schedule.advance()
    prepare((ranks, min(ranks.of(ranks.schedule.drawn), ranks.rank)) for ranks in stepped)
    if not stepped:
        for schedule in {ranks.schedule for ranks in _live()}:
            schedule.count_foreign_step(optimizer)


register_optimizer_step_pre_hook(_keep_frozen)
register_optimizer_step_post_hook(_after_step)
