"""What DeepSpeed's engine does with the parameters of a model, and the steps that it takes.

ZeRO steps over flat copies of the parameters, in parts on several processes, so that none of torch's optimizer hooks
sees the step of a parameter. ZeRO-3 keeps the parameters themselves in parts, and gathers those of a module, and those
that were registered as external to it, for the module's own forward and backward pass.

Nothing here imports DeepSpeed before the program has.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

# Calls that are made around each step of an engine, in this order.
_watchers: list[StepWatcher] = []


class StepWatcher(Protocol):
    """Told of the steps of DeepSpeed's engines."""

    def before(self, engine: Any) -> Any:
        """An engine is about to change the parameters of its `module`; what is returned goes to `after`."""
        ...

    def after(self, engine: Any, noted: Any) -> None:
        """It has changed them; not called for a step that was skipped, for an overflow in float16."""
        ...


def is_imported() -> bool:
    """Whether the program has imported DeepSpeed's engine."""
    return "deepspeed.runtime.engine" in sys.modules


def watch_steps(watcher: StepWatcher) -> None:
    """Let `watcher` know of each step of each engine.

    Raises:
        RuntimeError: this version of DeepSpeed does not tell whether a step was taken.
    """
    if watcher in _watchers:
        return
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    needed = ("step", "was_step_applied", "is_gradient_accumulation_boundary")
    lacking = [name for name in needed if not hasattr(DeepSpeedEngine, name)]
    if lacking:
        raise RuntimeError(
            f"deepspeed {deepspeed.__version__}: its engine has no {', '.join(lacking)}, so the steps of this adapter "
            "cannot be counted. Use a version that has been tried, 0.19.8, or DDP or FSDP2."
        )
    if not _watchers:
        DeepSpeedEngine.step = _told(DeepSpeedEngine.step)
    _watchers.append(watcher)


def _told(step: Callable[..., Any]) -> Callable[..., Any]:
    # Of the engine's class: accelerate calls the engine's step itself, and a subclass may add to it.
    @functools.wraps(step)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_gradient_accumulation_boundary():
            return step(self, *args, **kwargs)
        notes = [(watcher, watcher.before(self)) for watcher in _watchers]
        result = step(self, *args, **kwargs)
        if self.was_step_applied():
            for watcher, noted in notes:
                watcher.after(self, noted)
        return result

    return told


def is_parted(tensor: torch.Tensor | None) -> bool:
    """Whether ZeRO-3 holds the tensor in parts at the moment."""
    return tensor is not None and not tensor.numel() and hasattr(tensor, "ds_id")


def is_of_zero3(tensor: torch.Tensor | None) -> bool:
    """Whether ZeRO-3 has the tensor, in parts or gathered at the moment."""
    return hasattr(tensor, "ds_id")


def steps_over_copies(tensor: torch.Tensor) -> bool:
    """Whether ZeRO, or the float32 copy that it keeps of bfloat16, stands between the optimizer and the tensor."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


def full_value(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of the whole parameter as the optimizer has it, in float32. Every process has to ask."""
    from deepspeed.utils import safe_get_full_fp32_param

    value: torch.Tensor | None = safe_get_full_fp32_param(parameter)
    assert value is not None, "asked of parameters that ZeRO has only: see steps_over_copies"
    return value.clone()


def set_full_value(parameter: Any, value: torch.Tensor) -> None:
    """Write it, for the optimizer and for the next forward pass. Every process has to."""
    import deepspeed

    if not hasattr(parameter, "ds_id"):
        deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
        return
    # DeepSpeed's own way to write the whole fails where the parts do not come out even
    part = torch.zeros_like(deepspeed.utils.safe_get_local_fp32_param(parameter))
    start = torch.distributed.get_rank(parameter.ds_process_group) * part.numel()
    own = value.flatten()[start : start + part.numel()]
    part[: own.numel()].copy_(own)
    deepspeed.utils.safe_set_local_fp32_param(parameter, part)
    # the optimizer's copy alone would leave the part that the next pass gathers
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)


@contextmanager
def at_hand(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """What ZeRO-3 has of these in parts is whole for a while. Every process has to ask."""
    parted = [parameter for parameter in parameters if is_parted(parameter)]
    if not parted:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parted):
        yield


def gather_with(module: nn.Module, parameters: Iterable[torch.Tensor]) -> None:
    """Let ZeRO-3 have these at hand in each pass of `module`, inside whose forward pass this is called."""
    known = module.__dict__.get("_external_params", {})
    parameter: Any  # ZeRO-3 gives it names that torch does not know
    for parameter in parameters:
        if not hasattr(parameter, "ds_id") or id(parameter) in known:
            continue
        import deepspeed

        deepspeed.zero.register_external_parameter(module, parameter)
        if hasattr(module, "ds_id"):  # the pass has begun, so what its hook does for a registered one is done here
            parameter.ds_active_sub_modules.add(module.ds_id)
            if is_parted(parameter):
                parameter.all_gather()


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Let a model whose parameters ZeRO-3 has parted run before an engine has it: each module gathers its own.

    Every process has to run it, on inputs alike.
    """
    parted = [module for module in model.modules() if any(map(is_parted, module._parameters.values()))]
    if not parted:
        yield
        return
    import deepspeed

    open_ones: dict[nn.Module, ExitStack] = {}

    def enter(module: nn.Module, args: Any) -> None:
        open_ones[module] = ExitStack()
        open_ones[module].enter_context(deepspeed.zero.GatheredParameters([*module.parameters(recurse=False)]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        open_ones.pop(module).close()

    handles = [module.register_forward_pre_hook(enter) for module in parted]
    handles += [module.register_forward_hook(leave, always_call=True) for module in parted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
