"""DyLoRA in plain loops of accelerate, in one process or in two under an engine; writes what came out.

python loops_script.py ENGINE OUT CELLS...
"""

import os
import sys
from typing import Any

from tests.distributed.gloo import deepspeed_config, run_cells, use

ENGINE, OUT, *CELLS = sys.argv[1:]
use(ENGINE)

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_dynamic import QDyLoRAConfig, export_lora
from tests.tuners.common import adapted, optimizer_of, rows, tiny_llama
from tests.tuners.methods import METHODS

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
STAGE = int(ENGINE[-1]) if ENGINE.startswith("zero") else 0


def accelerator_for(accumulate: int = 1, **settings: object) -> Accelerator:
    plugins: dict[str, Any] = {}
    if STAGE:
        sizes = {
            "train_micro_batch_size_per_gpu": 4 // accumulate // PROCESSES,
            "gradient_accumulation_steps": accumulate,
            "train_batch_size": 4,
            "gradient_clipping": 1.0,
        }
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=deepspeed_config(STAGE, **(sizes | settings)))
    if ENGINE == "fsdp2":
        plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=ENGINE in ("single", "ddp"), gradient_accumulation_steps=accumulate, **plugins)


def full(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of a trained parameter, in float32."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor().float()
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().float().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().float().clone()


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: full(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def schedule(model: Any) -> Any:
    """Of a method that draws ranks, or None."""
    states = (state for module in model.modules() for state in getattr(module, "lora_views", {}).values())
    return getattr(next(states, None), "schedule", None)


def loop(accelerator: Accelerator, model: Any, steps: int = 6, accumulate: int = 1) -> dict[str, Any]:
    """Steps over all rows; what it was like before each of them and in the end."""
    wrapped, optimizer = accelerator.prepare(model, optimizer_of(model, eps=1e-3))
    ranks, states, counted = [], [], []
    torch.manual_seed(100 + accelerator.process_index)
    for step in range(steps):
        ranks.append(getattr(schedule(model), "drawn", None))
        states.append(state_of(model))
        for part in rows()[4 * step : 4 * step + 4].chunk(accumulate):
            own = part.chunk(PROCESSES)[accelerator.process_index]
            wrapped.train()
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(input_ids=own, labels=own).loss)
                if not STAGE and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        counted.append(getattr(schedule(model), "steps", None))
    states.append(state_of(model))
    return {"ranks": ranks, "states": states, "counted": counted}


def accumulation() -> dict[str, Any]:
    """Two micro-batches a step."""
    accelerator = accelerator_for(accumulate=2)
    torch.manual_seed(0)
    return loop(accelerator, adapted(), accumulate=2)


def frozen_bfloat16() -> dict[str, Any]:
    """What update="frozen" must not move stays to the bit, in the float32 copy too."""
    accelerator = accelerator_for(bf16={"enabled": True})
    torch.manual_seed(0)
    model = adapted(update="frozen", init_lora_weights=False).to(torch.bfloat16)
    return loop(accelerator, model)


def overflow_float16() -> dict[str, Any]:
    """The first steps overflow and are skipped: no rank is drawn for them."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # some CPUs are slow at it, all can
    accelerator = accelerator_for(fp16={"enabled": True, "initial_scale_power": 24, "hysteresis": 1})
    torch.manual_seed(0)
    return loop(accelerator, adapted().half(), steps=8)


def no_zero_float16() -> dict[str, Any]:
    """DeepSpeed without ZeRO steps over float32 copies that it does not show."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    settings = {"zero_optimization": {"stage": 0}, "fp16": {"enabled": True, "loss_scale": 1.0}}
    found = loop(accelerator_for(**settings), adapted().half())
    model = adapted(update="frozen").half()
    before = state_of(model)
    try:
        loop(accelerator_for(**settings), model, steps=1)
        said = None
    except RuntimeError as error:
        said = str(error)
    return found | {
        "said": said,
        "moved": any((before[name] != value).any() for name, value in state_of(model).items()),
    }


def no_zero_float32() -> dict[str, Any]:
    """Without ZeRO and in float32 it steps over the parameters themselves: torch's hooks count, and count once."""
    return loop(accelerator_for(zero_optimization={"stage": 0}), adapted(update="frozen"))


def loaded(method: str) -> dict[str, Any]:
    """A base model that was loaded when the engine was known: under ZeRO-3 it comes in parts."""
    accelerator = accelerator_for()
    folder = f"{OUT}-base"
    if accelerator.is_main_process:
        tiny_llama().save_pretrained(folder)
    accelerator.wait_for_everyone()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base, METHODS[method]())
    parted = not base.get_input_embeddings().weight.numel()
    return {"states": loop(accelerator, model, steps=3)["states"][-1:], "parted": parted}


def quantised() -> dict[str, Any]:
    """QDyLoRA over a 4-bit base, stored as FSDP2 and ZeRO-3 can part it: in the dtype of the rest."""
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    accelerator = accelerator_for()
    folder = f"{OUT}-quantised"
    if accelerator.is_main_process:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    accelerator.wait_for_everyone()
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit, dtype=torch.float32)
    torch.manual_seed(0)
    settings = {"r": 8, "ranks": [1, 2, 4, 8], "rank_sampling": "uniform", "target_modules": "all-linear"}
    model = get_peft_model(base, QDyLoRAConfig(**settings, task_type="CAUSAL_LM"))
    return loop(accelerator, model)


def reading() -> dict[str, Any]:
    """What reads the factors outside of a pass."""
    accelerator = accelerator_for()
    model = adapted()
    loop(accelerator, model, steps=2)
    said = {}
    for name, call in {
        "export_lora": lambda: export_lora(model, f"{OUT}-export", rank=2),
        "merge": lambda: model.merge_adapter(),
        "delta": lambda: next(m for m in model.modules() if hasattr(m, "lora_views")).get_delta_weight("default"),
    }.items():
        model.set_rank(2)
        try:
            call()
            said[name] = None
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
        model.unmerge_adapter()
    return {"said": said}


KNOWN = {
    "accumulation": accumulation,
    "frozen-bfloat16": frozen_bfloat16,
    "overflow-float16": overflow_float16,
    "no-zero-float16": no_zero_float16,
    "no-zero-float32": no_zero_float32,
    "quantised": quantised,
    "reading": reading,
} | {f"loaded-{method}": (lambda method=method: loaded(method)) for method in METHODS}


if __name__ == "__main__":
    run_cells(OUT, {cell: KNOWN[cell] for cell in CELLS})
