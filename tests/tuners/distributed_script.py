"""Six steps of DyLoRA as one process, under accelerate's DDP, or under FSDP2; writes what came out.

python distributed_script.py single|ddp|fsdp2 nested|frozen OUT
"""

import gc
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard

from tests.tuners.common import adapted, optimizer_of, rows, schedule_of


def main(kind: str, update: str, out: str) -> None:
    model = adapted(update=update)
    schedule = schedule_of(model)
    wrapped = model
    if kind == "fsdp2":
        dist.init_process_group("gloo")
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        index, processes, backward, optimizer = dist.get_rank(), dist.get_world_size(), torch.Tensor.backward, None
        optimizer = optimizer_of(model)
    else:
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(100 + accelerator.process_index)  # ranks must not depend on the process's own generator
        wrapped, optimizer = accelerator.prepare(model, optimizer_of(model))
        index, processes, backward = accelerator.process_index, accelerator.num_processes, accelerator.backward
    ranks = []
    for step in range(6):
        batch = rows()[4 * step : 4 * step + 4]
        part = batch.chunk(processes)[index]
        wrapped.train()
        ranks.append(schedule.drawn)
        backward(wrapped(input_ids=part, labels=part).loss)
        optimizer.step()
        optimizer.zero_grad()
    if processes > 1:
        everywhere: list = [None] * processes
        dist.all_gather_object(everywhere, ranks)
        assert everywhere[0] == everywhere[1]
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
        if "lora_" in name
    }
    if index == 0:
        torch.save({"state": state, "ranks": ranks, "processes": processes}, out)
    if dist.is_initialized():
        # DDP's reducer first: when it is the last to hold gloo's process group, the group waits for its threads with
        # the interpreter's lock in hand, which one of them may want, and the process never ends (one run in ten).
        if kind == "ddp":
            accelerator.free_memory()
        del wrapped, backward
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
