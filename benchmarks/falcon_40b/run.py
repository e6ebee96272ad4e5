"""QDyLoRA on a model of Falcon-40B's shape in under 32 GiB of GPU memory, the paper's headline, with random weights.

The weights are made and quantised to NF4 one layer at a time on the device: the memory and the time do not depend on
their values. Ranks 1, 2, 4, ..., 64, every linear layer of each block, batch 1 x 512, gradient checkpointing, paged
AdamW. --tiny takes a few small layers, on a CPU.
"""

import time
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import FalconConfig, FalconForCausalLM

from benchmarks.study import Cell, Context
from peft_dynamic import QDyLoRAConfig


def quantized_model(settings: dict[str, Any], device: torch.device, compute_dtype: torch.dtype) -> FalconForCausalLM:
    """The model with each block's linear layers in NF4 with double quantisation, all else in `compute_dtype`."""
    with init_empty_weights():
        model = FalconForCausalLM(FalconConfig(**settings))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = 0.02 * torch.randn(module.out_features, module.in_features, dtype=compute_dtype, device=device)
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=compute_dtype,
                quant_type="nf4",
                device="meta",
            )
            layer.weight = bnb.nn.Params4bit(
                weight.cpu() if device.type == "cpu" else weight,
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=True,
                module=layer,
            ).to(device)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            del weight
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            parent, _, child = name.rpartition(".")
            fill = torch.ones if parameter.ndim == 1 else torch.randn
            value = fill(parameter.shape, dtype=compute_dtype, device=device) * (1.0 if parameter.ndim == 1 else 0.02)
            setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    rebuilt = FalconForCausalLM.base_model_prefix
    for name, buffer in list(model.named_buffers()):
        if buffer.device.type == "meta":
            raise RuntimeError(f"{rebuilt}: the buffer {name} was not made; transformers has changed the model")
    model.is_loaded_in_4bit = True
    return model.to(device)


def prepared(shape: dict[str, Any], device: torch.device) -> Any:
    torch.manual_seed(0)
    model = quantized_model(shape, device, torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    config = QDyLoRAConfig(
        r=64,
        lora_alpha=16,
        lora_dropout=0.05,
        rank_sampling="uniform",
        target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def run(cell: Cell, context: Context) -> dict[str, Any]:
    options, on_gpu = context.settings, torch.cuda.is_available()
    if not on_gpu and options["shape"]["num_hidden_layers"] > 8:
        raise SystemExit("Falcon-40B's shape needs a GPU with 32 GiB or more. Pass --tiny to try it on a CPU.")
    device = torch.device("cuda" if on_gpu else "cpu")
    model = prepared(options["shape"], device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW32bit(trained, lr=1e-4) if on_gpu else torch.optim.AdamW(trained, lr=1e-4)
    schedule = next(m.lora_views["default"].schedule for m in model.modules() if hasattr(m, "lora_views"))
    ids = torch.randint(0, options["shape"]["vocab_size"], (1, options["length"]), device=device)
    steps = []
    for _ in range(options["steps"]):
        start = time.perf_counter()
        rank = schedule.drawn
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"rank": rank, "loss": float(loss.detach()), "seconds": time.perf_counter() - start})
    return {
        "parameters": sum(getattr(p, "quant_state", p).shape.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in trained),
        "length": options["length"],
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "under_32_gib": torch.cuda.max_memory_allocated() < 32 * 2**30 if on_gpu else None,
        "ranks_seen": sorted({each["rank"] for each in steps}),
        "steps": steps,
    }
