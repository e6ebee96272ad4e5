"""What training does beside a layer: every optimizer's step is counted, and what it must not move is put back.

Notable: nothing has to be called. torch tells us of every optimizer step (a global hook), so plain loops, Trainer,
SFTTrainer, gradient accumulation and a GradScaler that skips a step all count the same thing. DeepSpeed's engines tell
of theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import count
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peft_dynamic.hosts.autograd import in_backward
from peft_dynamic.hosts.deepspeed import full_value, is_imported, set_full_value, steps_over_copies, watch_steps
from peft_dynamic.tuners.factors import LayerState, live_states

_order = count()  # of making
_before_step: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
_blank_steps: set[int] = set()


class StepSchedule(nn.Module):
    """What changes with the optimizer steps of one adapter, shared by all its layers.

    The number of steps is a buffer (`step`, int64, shape ()), so that it travels with the adapter's checkpoint:
    `resume_from_checkpoint` and `load_adapter` go on where it stopped.

    Attributes:
        entered_training: whether the model has been trained on since the last step of any optimizer.
        holds_still: whether a part of the factors must not move in a step.
        optional_buffers: what a checkpoint may have or not.
        stock: of a stock LoRA, whose steps nobody has to count.
        unseen_steps: those of optimizers without our factors, as long as none with them was seen.
        updates: optimizer steps seen by this process, never set back.
        method: its name in messages, `field` what asks for parts that stand still, and `instead` what to do without.
    """

    holds_still = False
    optional_buffers: tuple[str, ...] = ()
    stock = False
    step: torch.Tensor
    method: ClassVar[str]
    field: ClassVar[str]
    instead: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.entered_training = False
        self.unseen_steps = 0
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device="cpu"))
        self._seen: tuple[int, int] | None = None
        self._steps = 0
        self.updates = 0

    @property
    def steps(self) -> int:
        """How many optimizer steps were taken, before a resume too."""
        return self._steps

    @property
    def unmoved(self) -> str:
        """What goes wrong where no step is seen, for messages; each method says its own."""
        raise NotImplementedError

    def arrive(self) -> None:
        """The number of steps is another one."""

    def refresh(self) -> None:
        """Take over a step number that was loaded from a checkpoint."""
        seen = (id(self.step), self.step._version)
        if seen != self._seen:  # reading the number is a device synchronisation: only when the buffer has changed
            self._seen, self._steps = seen, int(self.step)
            self.arrive()

    def advance(self) -> None:
        """One optimizer step has been taken."""
        self.refresh()
        self._steps += 1
        self.updates += 1
        with torch.no_grad():
            self.step.fill_(self._steps)
        self._seen = (id(self.step), self.step._version)
        self.arrive()

    def enter_training(self) -> None:
        """A forward pass that is trained on begins."""
        self.entered_training = True


class SteppedState(LayerState):
    """The state of an adapter in a layer that changes with the optimizer steps.

    Attributes:
        order: its place among all that were made.
        schedule: of the adapter.
    """

    def __init__(self, schedule: StepSchedule, parts: tuple[Any, Any]) -> None:
        super().__init__(parts)
        self.schedule: Any = schedule
        self.order = next(_order)

    def is_trained(self) -> bool:
        return any(factor.requires_grad for factor in self.factors())

    def moving_parts(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """For both factors, whose values these are: the mask of what this step trains.

        Asked where the schedule `holds_still`; what stands still is each method's own.
        """
        raise NotImplementedError

    @classmethod
    def prepare_next(cls, states: list[Any]) -> None:
        """An optimizer has stepped over these; the next pass begins."""


def _live() -> list[SteppedState]:
    """Every (layer, adapter) alive: a copied model's schedule follows the copy's optimizer."""
    return [state for state in live_states() if isinstance(state, SteppedState)]


def _held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _stepped(held: set[int]) -> list[SteppedState]:
    """Those that have factors among what is held."""
    return [state for state in _live() if any(id(factor) in held for factor in state.factors())]


def _distribute_like(mask: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not hasattr(parameter, "placements"):
        return mask
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _led(held: set[int], stepped: list[SteppedState]) -> set[StepSchedule]:
    """The schedules whose step this is: of several optimizers over one adapter that with its first factor counts."""
    ours = {state.schedule for state in stepped}
    first: dict[StepSchedule, bool] = {}
    for state in sorted(_live(), key=lambda state: state.order):
        trained = [factor for factor in state.factors() if factor.requires_grad]
        if trained and state.schedule in ours:
            first.setdefault(state.schedule, id(trained[0]) in held)
    return {schedule for schedule, mine in first.items() if mine}


def _check_whole(stepper: object, held: set[int], stepped: list[SteppedState]) -> None:
    """Refuse parts that stand still over several optimizers: the first one's step would count for the others."""
    still = {state.schedule for state in stepped if state.schedule.holds_still}
    for state in _live() if still else ():
        if state.schedule in still and any(p.requires_grad and id(p) not in held for p in state.factors()):
            raise RuntimeError(
                f"{state.schedule.field} trains one part of all factors in a step, and {type(stepper).__name__} holds "
                f"some of them only: {state.name or 'a layer'} is not in it. Put all lora_A and lora_B into one "
                f"optimizer (in groups, where they differ), freeze the others, or {state.schedule.instead}. Nothing "
                "has been updated."
            )


def _keep_frozen(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before an optimizer step: remember what it must not move."""
    saved = []
    held = _held_by(optimizer)
    stepped = _stepped(held)
    _check_whole(optimizer, held, stepped)
    for state in stepped:
        if state.schedule.holds_still:
            factors = state.factors()
            for factor, mask in zip(factors, state.moving_parts(factors), strict=True):
                if factor.requires_grad:
                    saved.append((factor, factor.detach().clone(), _distribute_like(mask, factor)))
    _before_step[id(optimizer)] = saved
    _blank_steps.discard(id(optimizer))  # of a step that an error ended
    if stepped and _is_blank(optimizer, stepped):
        _blank_steps.add(id(optimizer))


def _is_blank(optimizer: torch.optim.Optimizer, stepped: list[SteppedState]) -> bool:
    """Whether torch's distributed checkpoints take the step, to make an optimizer's state before they fill it.

    They do so at rate 0, with gradients of zeros that they make, when nothing has been trained. A resume under FSDP2
    would otherwise be one step ahead.
    """
    if optimizer.state or any(state.schedule.entered_training for state in stepped):
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
    """After an optimizer step: put back what had to stand still, and count."""
    held = _held_by(optimizer)
    stepped = _stepped(held)
    if stepped and in_backward():
        raise RuntimeError(
            f"{type(optimizer).__name__} stepped inside backward (a layer-wise optimizer). "
            f"{stepped[0].schedule.method} changes with each optimizer step, and a backward pass must finish as it "
            "began. Use an optimizer that steps after backward."
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
        for schedule in {state.schedule for state in _live()}:
            _count_foreign_step(schedule, optimizer)


def _count_foreign_step(schedule: StepSchedule, optimizer: torch.optim.Optimizer) -> None:
    """Warn when training goes on and no optimizer that steps holds the factors: nothing would ever change."""
    if schedule.updates or schedule.stock or not schedule.entered_training:
        return
    schedule.entered_training = False  # so that another model's steps do not count against one that stands still
    schedule.unseen_steps += 1
    if schedule.unseen_steps == 3:
        if any(steps_over_copies(p) for state in _live() if state.schedule is schedule for p in state.factors()):
            raise RuntimeError(
                f"DeepSpeed has stepped 3 times over copies of this {schedule.method} adapter's factors, and its "
                f"engine told of no step: {schedule.unmoved}. Call the step of a DeepSpeedEngine, as accelerate does, "
                "or use DDP or FSDP2."
            )
        warnings.warn(
            f"{type(optimizer).__name__} has stepped 3 times and holds none of the {schedule.method} adapter's "
            f"factors: {schedule.unmoved}. Optimizers over copies or flat buffers of the parameters (FSDP1 with "
            "use_orig_params=False) are not supported: use DDP, FSDP2 or DeepSpeed.",
            stacklevel=3,
        )


def _advance(held: set[int], stepped: list[SteppedState]) -> None:
    for schedule in _led(held, stepped):
        schedule.advance()
        schedule.entered_training = False


def _prepare_next(stepped: list[SteppedState]) -> None:
    for kind in {type(state): None for state in stepped}:
        kind.prepare_next([state for state in stepped if type(state) is kind])


class _EngineSteps:
    """The same around the steps of DeepSpeed's engines, which step over copies that no hook of torch knows."""

    def before(self, engine: Any) -> Any:
        """What the step must not move, and how many steps torch's hooks have counted by now."""
        held = {id(parameter) for parameter in engine.module.parameters() if parameter.requires_grad}
        stepped = sorted(_stepped(held), key=lambda state: state.order)  # alike in all processes, which gather
        _check_whole(engine, held, stepped)
        seen_by_torch = _held_by(engine.optimizer)
        saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for state in stepped:
            factors = state.factors()
            trained = [factor for factor in factors if factor.requires_grad]
            if not state.schedule.holds_still or any(id(factor) in seen_by_torch for factor in trained):
                continue
            if not all(map(steps_over_copies, trained)):
                raise RuntimeError(
                    f"{state.schedule.field} puts back what a step must not move, and this DeepSpeed engine steps over "
                    "copies that it does not show: float16 without ZeRO. Set zero_optimization.stage to 1, 2 or 3 in "
                    f"its configuration, or {state.schedule.instead}. Nothing has been updated."
                )
            values = [full_value(factor) if factor.requires_grad else factor for factor in factors]
            masks = state.moving_parts(values)
            saved.extend(each for each in zip(factors, values, masks, strict=True) if each[0].requires_grad)
        return held, stepped, saved, {state.schedule: state.schedule.updates for state in stepped}

    def after(self, engine: Any, noted: Any) -> None:
        """Put back what had to stand still and count, unless torch's hooks have."""
        held, stepped, saved, counted = noted
        with torch.no_grad():
            for factor, before, moving in saved:
                set_full_value(factor, torch.where(moving, full_value(factor), before))
        unseen = [state for state in stepped if state.schedule.updates == counted[state.schedule]]
        _advance(held, unseen)
        _prepare_next(unseen)


_engine_steps = _EngineSteps()


class PassHooks:
    """Hooks that note each forward pass of the whole model; a copied or unpickled model has its own.

    Args:
        schedule: of the adapter.
    """

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule

    def register(self, model: nn.Module) -> list[Any]:
        """Put them on the model; returns their handles."""
        return [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a forward pass of the model."""
        if torch.compiler.is_compiling():
            return
        schedule = self.schedule
        trains = module.training and torch.is_grad_enabled()
        if trains and not schedule.stock and is_imported():
            watch_steps(_engine_steps)
        self.begin(trains)
        if torch.is_grad_enabled():
            schedule.refresh()
        if trains:
            schedule.enter_training()

    def begin(self, trains: bool) -> None:
        """The same, for what a method does more."""

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it; runs after an `Exception` too, and after nothing else that is raised."""


register_optimizer_step_pre_hook(_keep_frozen)
register_optimizer_step_post_hook(_after_step)
