"""Quantised base layers: which they are, and the repair of a bitsandbytes trap on CPUs.

bitsandbytes 0.50 on a CPU with AVX512-BF16 repacks a 4-bit weight in the first eval-mode forward pass without
gradients. From then on the layer runs a kernel without autograd: training gets no gradient, with only a UserWarning,
and `model.train()` does not undo it.
"""

import sys
from typing import Any

from torch import nn


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers of `model` whose weights are quantised."""
    return [name for name, module in model.named_modules() if is_quantized(module)]


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer holds quantised weights: bitsandbytes, GPTQ, AWQ, AQLM, EETQ, HQQ, torchao or INC."""
    weight = module._parameters.get("weight")
    if weight is not None and type(weight).__name__ in ("Params4bit", "Int8Params"):
        return True
    if weight is not None and type(weight.data).__module__.startswith("torchao."):
        return True
    return any(name in module.__dict__ or name in module._buffers for name in ("qweight", "W_q", "codebooks")) or any(
        name in module._parameters for name in ("qweight", "W_q", "codebooks")
    )


def keep_gradients_after_evaluation(model: nn.Module) -> None:
    """Make the bitsandbytes 4-bit layers of `model` undo the CPU's packing when they train again."""
    bnb = sys.modules.get("bitsandbytes")  # a model cannot have its layers without it
    if bnb is None:
        return
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and _unpack_for_training not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_unpack_for_training)


def _unpack_for_training(layer: Any, args: Any) -> None:
    if not layer.training:
        return
    state = getattr(layer.weight, "quant_state", None)
    if state is None or not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
