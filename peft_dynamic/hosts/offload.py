"""Parameters that a host keeps elsewhere: in CPU memory, on disk, or in parts on several devices."""

from __future__ import annotations

import torch
from torch import nn

from peft_dynamic.hosts.deepspeed import at_hand, is_parted, set_full_value, steps_over_copies


def real(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, the module's parameter or buffer of this name, or where that is offloaded what accelerate has of it.

    accelerate fetches the parameters of a module for that module's own forward pass. Ours are computed from several
    modules together, and asked for outside of these passes too.
    """
    if tensor.device.type != "meta":
        return tensor
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        kept = getattr(each, "weights_map", None)
        if kept is None or not getattr(each, "offload", False):
            continue
        try:
            value: torch.Tensor = kept[name]
        except KeyError:  # another hook's
            continue
        return value if each.execution_device is None else value.to(each.execution_device)
    return tensor


def is_put_away_by_host(module: nn.Module, tensor: torch.Tensor) -> bool:
    """Whether a host puts the module's weight away and back, and asks for it by name: accelerate's offloading, FSDP.

    accelerate's `add_hook_to_module` keeps the module's forward, lets the hook put the weight away, and then notes the
    hook. FSDP2's parameters have placements while it has not gathered them. FSDP1 marks the parameters that it has, and
    puts a plain tensor in their place while it has gathered them.
    """
    names = module.__dict__
    if "_old_forward" in names:
        hook = names.get("_hf_hook")
        if hook is None or any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook])):
            return True
    return "weight" in names or hasattr(tensor, "placements") or getattr(tensor, "_fsdp_flattened", False)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether FSDP2, or DeepSpeed's ZeRO-3, holds the tensor in parts at the moment."""
    return hasattr(tensor, "placements") or is_parted(tensor)


def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor that FSDP2 holds in parts, gathered, with a gradient that is averaged over the processes as FSDP2's are.

    Of a module whose forward pass is not what reads it: FSDP2 gathers, and reduces gradients, around these alone.
    """
    if tensor is None or not hasattr(tensor, "placements"):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(tensor, DTensor)
    gathered = tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)
    if gathered.requires_grad:
        gathered.register_hook(lambda gradient: gradient / tensor.device_mesh.size())
    return gathered


@torch.no_grad()
def read_whole(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a whole parameter, whoever holds the parts. Every process has to ask."""
    if hasattr(parameter, "placements"):
        from torch.distributed.tensor import DTensor

        assert isinstance(parameter, DTensor)
        return parameter.full_tensor().clone()
    with at_hand([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def write_whole(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Let a parameter have this value, whoever holds the parts. Every process has to."""
    if hasattr(parameter, "placements"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        value = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None))
    elif steps_over_copies(parameter):
        set_full_value(parameter, value.to(parameter.device))
    else:
        parameter.copy_(value)
