"""One step in two processes, in a bare loop under DDP and under Trainer; writes the gradients.

python distributed_script.py OUT
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from peft_dynamic.density import ActivationDensityLoss
from tests.density.models import EPS, WEIGHT, batch_for, gradients, with_lora
from tests.density.test_trainers import arguments, rows_of, step_of


def main(out: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, batch = with_lora("Bert"), batch_for("Bert")
    ActivationDensityLoss(WEIGHT, EPS).attach(model)
    wrapped = DistributedDataParallel(model)
    wrapped(**{key: value[rank::2] for key, value in batch.items()}).loss.backward()
    bare = gradients(model)
    del wrapped

    model, batch = with_lora("Llama"), batch_for("Llama")
    ActivationDensityLoss(WEIGHT, EPS).attach(model)
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    trainer = Trainer(model, arguments(Path(tempfile.mkdtemp()), **settings), train_dataset=rows_of(batch))
    step = step_of(trainer, model)
    logs = [entry["density_loss"] for entry in trainer.state.log_history if "loss" in entry]
    if rank == 0:
        torch.save({"bare": bare, "trainer": step, "log": logs, "processes": trainer.args.world_size}, out)
    trainer.accelerator.free_memory()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
