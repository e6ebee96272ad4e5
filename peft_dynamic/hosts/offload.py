"""The values of a parameter that accelerate keeps in CPU memory or on disk between the forward passes of its module."""

from __future__ import annotations

import torch
from torch import nn


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
