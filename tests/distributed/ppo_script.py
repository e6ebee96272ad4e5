"""PPO in one process or in two under an engine; writes what came out.

python ppo_script.py ENGINE OUT CASES...

Three rollouts of two optimizer steps, an evaluation, and a resume from inside the second rollout.
"""

import gc
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.distributed.gloo import arguments, run_cells, use

ENGINE, OUT, *CASES = sys.argv[1:]
use(ENGINE)

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from peft_dynamic import DyLoRAConfig
from peft_dynamic.hosts.offload import read_whole
from peft_dynamic.trainers import PPOConfig
from tests.trainers.ppo.common import early_letters, prompts, tiny_policy, trainer

KINDS = ("lora", "dylora", "full", "lora-head", "loaded")
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
OF_THE_CLOCK = ("runtime", "per_second", "total_flos", "epoch")


def adapter(kind: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if kind == "dylora":
        return {"peft_config": DyLoRAConfig(ranks=[1, 2, 4], rank_sampling="uniform", **settings)}
    if kind == "lora-head":
        return {"peft_config": LoraConfig(modules_to_save=["lm_head"], **settings)}
    return {} if kind == "full" else {"peft_config": LoraConfig(**settings)}


def policy(kind: str) -> Any:
    model = tiny_policy()
    if kind != "loaded":
        return model
    folder = f"{Path(OUT).with_suffix('')}-base"
    if int(os.environ.get("RANK", 0)) == 0:
        model.save_pretrained(folder)
    if dist.is_initialized():
        dist.barrier()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # in parts under ZeRO-3


def train(kind: str, resume: bool) -> dict[str, Any]:
    folder = Path(f"{Path(OUT).with_suffix('')}-{kind}")
    more = arguments(
        ENGINE,
        per_device_train_batch_size=4 // PROCESSES,
        per_device_eval_batch_size=4 // PROCESSES,
        shuffle_dataset=False,
        num_ppo_epochs=2,
        max_steps=6,
        learning_rate=1e-2,
        adam_epsilon=1e-2,
        max_grad_norm=0.5,
        save_strategy="steps",
        save_steps=3,
        use_cpu=ENGINE in ("single", "ddp"),
        bf16=False,
    )
    kept = None
    if kind == "loaded":  # zero.Init wants to know the engine when the model is loaded
        engine = {name: more[name] for name in ("deepspeed", "fsdp", "fsdp_config", "use_cpu") if name in more}
        kept = PPOConfig(str(folder), bf16=False, **engine)
    made = trainer(folder, policy(kind), reward_funcs=early_letters, eval_dataset=prompts(5), **more, **adapter(kind))
    del kept
    made.value_function.head.weight.data.copy_(torch.linspace(-1, 1, 32)[None])
    complete = made.rollouts.complete  # the likeliest tokens: what is drawn hangs on the process
    made.rollouts.complete = lambda prompts, sample, seeds: complete(prompts, False, seeds)
    made.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    evaluated = made.evaluate()
    out = folder / ("resumed" if resume else "whole")
    made.save_model(str(out))
    made.accelerator.wait_for_everyone()
    saved: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        saved |= load_file(file)
    logs = [*made.state.log_history, evaluated]
    logs = [{key: v for key, v in entry.items() if not key.endswith(OF_THE_CLOCK)} for entry in logs]
    found = {"saved": saved, "logs": logs, "type": made.accelerator.distributed_type.value}
    made.accelerator.free_memory()  # DDP's reducer before the process group, see tests/tuners/distributed_script.py
    made.model_wrapped = made.model
    del made
    AcceleratorState._reset_state(reset_partial_state=False)
    gc.collect()
    return found


def refused(kind: str) -> dict[str, Any]:
    """What is said to a run that must not go on, and whether it has changed the weights."""
    more = arguments(ENGINE, per_device_train_batch_size=2, use_cpu=False, bf16=False, learning_rate=1e-2)
    if kind == "target_kl":
        more["target_kl"] = 0.1
    given = adapter("lora")
    if kind == "value_model":
        config = LlamaConfig(**tiny_policy().config.to_dict() | {"num_labels": 1})
        given["value_model"] = AutoModelForSequenceClassification.from_config(config)
    if kind == "virtual":
        given = {"peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")}
    folder = Path(f"{Path(OUT).with_suffix('')}-{kind}")
    before: dict[str, torch.Tensor] = {}
    made = None
    try:
        made = trainer(folder, tiny_policy(), reward_funcs=early_letters, **more, **given)
        before = {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}
        compute = made.compute_loss
        if kind == "nan":
            made.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * float("nan")
        made.train()
        said = None
    except (ValueError, RuntimeError, FloatingPointError) as error:
        said = f"{type(error).__name__}: {error}"
    after = {} if made is None else dict(made.model.named_parameters())
    moved = any(not torch.equal(read_whole(after[name]), value) for name, value in before.items())
    AcceleratorState._reset_state(reset_partial_state=False)
    return {"said": said, "moved": moved}


def cell(kind: str) -> dict[str, Any]:
    return {"whole": train(kind, False), "resumed": train(kind, True)} if kind in KINDS else refused(kind)


if __name__ == "__main__":
    run_cells(OUT, {kind: partial(cell, kind) for kind in CASES})
