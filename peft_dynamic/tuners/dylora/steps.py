"""What training does beside a layer: at every optimizer's step the next rank is drawn, and each pass is noted.

Notable: nothing has to be called. torch tells us of every optimizer step (a global hook), so plain loops, Trainer,
SFTTrainer, gradient accumulation and a GradScaler that skips a step all count the same thing.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peft_dynamic.hosts.autograd import in_backward
from peft_dynamic.tuners.dylora.ranks import AdapterRanks, prepare
from peft_dynamic.tuners.dylora.schedule import RankSchedule
from peft_dynamic.tuners.dylora.turns import turns_of
from peft_dynamic.tuners.factors import live_states

_before_step: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}


def _live() -> list[AdapterRanks]:
    """Every (layer, adapter) alive: a copied model's schedule follows the copy's optimizer."""
    return [state for state in live_states() if isinstance(state, AdapterRanks)]


def _stepped(optimizer: torch.optim.Optimizer) -> list[AdapterRanks]:
    """Those whose factors the optimizer holds."""
    live = _live()
    if not live:
        return []
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [ranks for ranks in live if any(id(factor) in held for factor in ranks.factors())]


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
    if stepped and in_backward():
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
    # the rank that comes next is the drawn one or the set one; at rank 0 a layer needs no basis
    prepare((ranks, min(ranks.of(ranks.schedule.drawn), ranks.rank or ranks.max_rank)) for ranks in stepped)
    if not stepped:
        for schedule in {ranks.schedule for ranks in _live()}:
            _count_foreign_step(schedule, optimizer)


def _count_foreign_step(schedule: RankSchedule, optimizer: torch.optim.Optimizer) -> None:
    """Warn when training goes on and no optimizer that steps holds the factors: their rank would never change."""
    if schedule.updates or schedule.stock or not schedule.entered_training:
        return
    schedule.entered_training = False  # so that another model's steps do not count against one that stands still
    schedule.unseen_steps += 1
    if schedule.unseen_steps == 3:
        warnings.warn(
            f"{type(optimizer).__name__} has stepped 3 times and holds none of the DyLoRA adapter's factors, so "
            f"the adapter still trains its first rank, {schedule.drawn}. Optimizers over copies or flat buffers of the "
            "parameters (DeepSpeed ZeRO, FSDP1 with use_orig_params=False) are not supported: use DDP or FSDP2.",
            stacklevel=3,
        )


def _refuse_deepspeed(schedule: RankSchedule) -> None:
    """Raise where DeepSpeed has the factors: it steps over flat buffers, and no hook of torch sees that."""
    for ranks in _live():
        if ranks.schedule is not schedule:
            continue
        if any(hasattr(factor, mark) for factor in ranks.factors() for mark in ("_hp_mapping", "ds_id")):
            raise RuntimeError(
                "DeepSpeed ZeRO steps over flat copies of the factors of this DyLoRA adapter, so that its steps "
                f"cannot be counted: every step would train rank {schedule.drawn}. Use DDP or FSDP2."
            )
        return


class PassHooks:
    """Hooks that note each forward pass of the whole model; a copied or unpickled model has its own.

    Args:
        schedule: of the adapter.
    """

    def __init__(self, schedule: RankSchedule) -> None:
        self.schedule = schedule

    def register(self, model: nn.Module) -> list[Any]:
        """Put them on the model; returns their handles."""
        return [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a forward pass of the model."""
        if kwargs.get("ranks") is not None:  # many models take any name, and would run at the set rank
            raise TypeError(
                f"ranks={kwargs['ranks']!r}: it is an argument of a PeftModel, and {type(module).__name__} cannot take "
                "it. Make the PeftModel with get_peft_model or PeftModel.from_pretrained, and call that."
            )
        if torch.compiler.is_compiling():
            return
        schedule = self.schedule
        trains = module.training and torch.is_grad_enabled()
        if trains and not schedule.updates and not schedule.stock:
            _refuse_deepspeed(schedule)
        turns_of(schedule).enter_call(trains)
        if torch.is_grad_enabled():
            schedule.refresh()
        schedule.entered_training = schedule.entered_training or trains

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it; runs after an `Exception` too, and after nothing else that is raised."""
        if not torch.compiler.is_compiling():
            turns_of(self.schedule).leave_call()


register_optimizer_step_pre_hook(_keep_frozen)
register_optimizer_step_post_hook(_after_step)
