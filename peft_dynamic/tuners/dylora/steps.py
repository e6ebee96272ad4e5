"""What training does beside a layer: at every optimizer's step the next rank is drawn, and each pass is noted.

Notable: nothing has to be called. torch tells us of every optimizer step (a global hook), so plain loops, Trainer,
SFTTrainer, gradient accumulation and a GradScaler that skips a step all count the same thing. DeepSpeed's engines tell
of theirs.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peft_dynamic.hosts.autograd import in_backward
from peft_dynamic.hosts.deepspeed import full_value, is_imported, set_full_value, steps_over_copies, watch_steps
from peft_dynamic.tuners.dylora.ranks import AdapterRanks, prepare
from peft_dynamic.tuners.dylora.schedule import RankSchedule
from peft_dynamic.tuners.dylora.turns import turns_of
from peft_dynamic.tuners.factors import live_states

_before_step: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
_blank_steps: set[int] = set()


def _live() -> list[AdapterRanks]:
    """Every (layer, adapter) alive: a copied model's schedule follows the copy's optimizer."""
    return [state for state in live_states() if isinstance(state, AdapterRanks)]


def _held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _stepped(held: set[int]) -> list[AdapterRanks]:
    """Those that have factors among what is held."""
    return [ranks for ranks in _live() if any(id(factor) in held for factor in ranks.factors())]


def _distribute_like(mask: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not hasattr(parameter, "placements"):
        return mask
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _led(held: set[int], stepped: list[AdapterRanks]) -> set[RankSchedule]:
    """The schedules whose step this is: of several optimizers over one adapter that with its first factor counts."""
    ours = {ranks.schedule for ranks in stepped}
    first: dict[RankSchedule, bool] = {}
    for ranks in sorted(_live(), key=lambda ranks: ranks.order):
        trained = [factor for factor in ranks.factors() if factor.requires_grad]
        if trained and ranks.schedule in ours:
            first.setdefault(ranks.schedule, id(trained[0]) in held)
    return {schedule for schedule, mine in first.items() if mine}


def _check_whole(stepper: object, held: set[int], stepped: list[AdapterRanks]) -> None:
    """Refuse update="frozen" over several optimizers: the first one's step would draw the next rank for the others."""
    frozen = {ranks.schedule for ranks in stepped if ranks.schedule.update == "frozen"}
    for ranks in _live() if frozen else ():
        if ranks.schedule in frozen and any(p.requires_grad and id(p) not in held for p in ranks.factors()):
            raise RuntimeError(
                f"update='frozen' trains one block of all factors in a step, and {type(stepper).__name__} holds a "
                f"part of them only: {ranks.name or 'a layer'} is not in it. Put all lora_A and lora_B into one "
                "optimizer (in groups, where they differ), freeze the others, or use update='nested'. Nothing has been "
                "updated."
            )


def _keep_frozen(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before an optimizer step: remember the components that update="frozen" must not move."""
    saved = []
    held = _held_by(optimizer)
    stepped = _stepped(held)
    _check_whole(optimizer, held, stepped)
    for ranks in stepped:
        if ranks.schedule.update == "frozen":
            factors = ranks.factors()
            for factor, mask in zip(factors, ranks.moving_parts(factors), strict=True):
                saved.append((factor, factor.detach().clone(), _distribute_like(mask, factor)))
    _before_step[id(optimizer)] = saved
    _blank_steps.discard(id(optimizer))  # of a step that an error ended
    if stepped and _is_blank(optimizer, stepped):
        _blank_steps.add(id(optimizer))


def _is_blank(optimizer: torch.optim.Optimizer, stepped: list[AdapterRanks]) -> bool:
    """Whether torch's distributed checkpoints take the step, to make an optimizer's state before they fill it.

    They do so at rate 0, with gradients of zeros that they make, when nothing has been trained. A resume under FSDP2
    would otherwise be one step ahead.
    """
    if optimizer.state or any(ranks.schedule.entered_training for ranks in stepped):
        return False
    if any(float(group.get("lr", 1)) for group in optimizer.param_groups):
        return False
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return not any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler found an overflow and left the skipping to the optimizer, as it does to fused ones."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.any())


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After an optimizer step: put frozen components back and draw the next rank."""
    held = _held_by(optimizer)
    stepped = _stepped(held)
    if stepped and in_backward():
        raise RuntimeError(
            f"{type(optimizer).__name__} stepped inside backward (a layer-wise optimizer). DyLoRA draws one rank per "
            "optimizer step, and a backward pass must finish at the rank it began with. Use an optimizer that steps "
            "after backward."
        )
    with torch.no_grad():
        for factor, before, moving in _before_step.pop(id(optimizer), []):
            factor.copy_(torch.where(moving, factor, before))
    blank = id(optimizer) in _blank_steps
    _blank_steps.discard(id(optimizer))
    if stepped and not blank and not _was_skipped(optimizer):
        _advance(held, stepped)
    _prepare_next(stepped)
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
        if any(steps_over_copies(p) for ranks in _live() if ranks.schedule is schedule for p in ranks.factors()):
            raise RuntimeError(
                "DeepSpeed has stepped 3 times over copies of this DyLoRA adapter's factors, and its engine told of "
                f"no step: every step would train rank {schedule.drawn}. Call the step of a DeepSpeedEngine, as "
                "accelerate does, or use DDP or FSDP2."
            )
        warnings.warn(
            f"{type(optimizer).__name__} has stepped 3 times and holds none of the DyLoRA adapter's factors, so "
            f"the adapter still trains its first rank, {schedule.drawn}. Optimizers over copies or flat buffers of the "
            "parameters (FSDP1 with use_orig_params=False) are not supported: use DDP, FSDP2 or DeepSpeed.",
            stacklevel=3,
        )


def _advance(held: set[int], stepped: list[AdapterRanks]) -> None:
    for schedule in _led(held, stepped):
        schedule.advance()
        schedule.entered_training = False


def _prepare_next(stepped: list[AdapterRanks]) -> None:
    # the rank that comes next is the drawn one or the set one; at rank 0 a layer needs no basis
    prepare((ranks, min(ranks.of(ranks.schedule.drawn), ranks.rank or ranks.max_rank)) for ranks in stepped)


class _EngineSteps:
    """The same around the steps of DeepSpeed's engines, which step over copies that no hook of torch knows."""

    def before(self, engine: Any) -> Any:
        """What update="frozen" must not move, and how many steps torch's hooks have counted by now."""
        held = {id(parameter) for parameter in engine.module.parameters() if parameter.requires_grad}
        stepped = sorted(_stepped(held), key=lambda ranks: ranks.order)  # alike in all processes, which gather
        _check_whole(engine, held, stepped)
        seen_by_torch = _held_by(engine.optimizer)
        saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for ranks in stepped:
            factors = ranks.factors()
            if ranks.schedule.update != "frozen" or id(factors[0]) in seen_by_torch:
                continue
            if not all(map(steps_over_copies, factors)):
                raise RuntimeError(
                    "update='frozen' puts back what a step must not move, and this DeepSpeed engine steps over copies "
                    "that it does not show: float16 without ZeRO. Set zero_optimization.stage to 1, 2 or 3 in its "
                    "configuration, or use update='nested'. Nothing has been updated."
                )
            values = [full_value(factor) for factor in factors]
            saved.extend(zip(factors, values, ranks.moving_parts(values), strict=True))
        return held, stepped, saved, {ranks.schedule: ranks.schedule.updates for ranks in stepped}

    def after(self, engine: Any, noted: Any) -> None:
        """Put frozen components back and draw the next rank, unless torch's hooks have."""
        held, stepped, saved, counted = noted
        with torch.no_grad():
            for factor, before, moving in saved:
                set_full_value(factor, torch.where(moving, full_value(factor), before))
        unseen = [ranks for ranks in stepped if ranks.schedule.updates == counted[ranks.schedule]]
        _advance(held, unseen)
        _prepare_next(unseen)


_engine_steps = _EngineSteps()


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
        if trains and not schedule.stock and is_imported():
            watch_steps(_engine_steps)
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
