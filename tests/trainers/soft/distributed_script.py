"""Three steps of SoFT and an evaluation, as one process or under DDP; writes what came out.

python distributed_script.py OUT
"""

import gc
import os
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist

from tests.trainers.soft.common import rows, trainer
from tests.trainers.soft.families import build


def main(out: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    results = {}
    for adapter in (False, True):
        more: dict = (
            {"peft_config": peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")} if adapter else {}
        )
        made = trainer(
            Path(out).parent / f"run-{processes}",
            build("llama"),
            exits_per_step=1,
            max_steps=3,
            per_device_train_batch_size=4 // processes,
            per_device_eval_batch_size=4 // processes,
            eval_data=rows(7),  # the last batch of two processes has a row twice
            optim="sgd",  # AdamW turns the rounding of a gradient near 0 into a whole step
            learning_rate=0.1,
            max_grad_norm=1.0,
            **more,
        )
        made.train()
        evaluated = made.evaluate()
        state = {name: p.detach() for name, p in made.model.named_parameters() if p.requires_grad}
        timing = ("runtime", "per_second", "flos", "epoch")
        log = [
            {key: value for key, value in entry.items() if not any(word in key for word in timing)}
            for entry in made.state.log_history[:3]
        ]
        results["lora" if adapter else "full"] = {
            "state": state,
            "log": log,
            "eval": {key: value for key, value in evaluated.items() if "loss" in key},
        }
        made.accelerator.free_memory()  # DDP's reducer before the process group, see tests/tuners/distributed_script.py
        made.model_wrapped = made.model
        gc.collect()
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(results, out)
    if dist.is_initialized():
        del made
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
