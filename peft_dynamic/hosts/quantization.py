"""Quantised base layers: which they are, and the repair of a bitsandbytes trap on CPUs.

bitsandbytes 0.50 on a CPU with AVX512-BF16 repacks a 4-bit weight in the first eval-mode forward pass without
gradients. From then on the layer runs a kernel without autograd: training gets no gradient, with only a UserWarning,
and `model.train()` does not undo it. A weight into which an adapter was merged even gives wrong outputs after packing.
So we switch the packing off: inference on such a CPU is slower than it could be, and right.
"""

import sys

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


def unpack_bnb_4bit(model: nn.Module) -> None:
    """Keep the bitsandbytes 4-bit layers of `model` from packing weights for CPU inference; unpack packed ones."""
    bnb = sys.modules.get("bitsandbytes")  # a model cannot have its layers without it
    if bnb is None:
        return
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                unpack = bnb.functional._convert_weight_packed_for_cpu_inverse
                module.weight.data, module.weight.quant_state = unpack(module.weight.data, state)
