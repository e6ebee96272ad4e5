"""Six steps of each of the methods as one process, under accelerate's DDP, or under FSDP2; writes what came out.

python distributed_script.py single|ddp|fsdp2 OUT METHODS...
"""

import gc
import sys
from typing import Any

sys.modules.setdefault("bitsandbytes", None)  # nothing here is quantised, and importing it takes seconds

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard

from tests.tuners.common import optimizer_of, rows
from tests.tuners.methods import with_method


def drawn_rank(model: Any) -> int | None:
    """The rank of this step, of a method that draws one."""
    for module in model.modules():
        for views in getattr(module, "lora_views", {}).values():
            if hasattr(views, "schedule"):
                return getattr(views.schedule, "drawn", None)
    return None


def run(kind: str, method: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = with_method(method)
    wrapped = model
    if kind == "fsdp2":
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        index, processes, backward = dist.get_rank(), dist.get_world_size(), torch.Tensor.backward
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
        ranks.append(drawn_rank(model))
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
        if "lora_" in name or "loretta_" in name or "modules_to_save" in name
    }
    if kind != "fsdp2":
        # DDP's reducer before the process group: when it is the last to hold it, the group waits for its threads with
        # the interpreter's lock in hand, which one of them may want, and the process never ends (one run in ten).
        accelerator.free_memory()
    return {"state": state, "ranks": ranks, "processes": processes}


def main(kind: str, out: str, *methods: str) -> None:
    if kind == "fsdp2":
        dist.init_process_group("gloo")
    results = {}
    for method in methods:
        results[method] = run(kind, method)
        gc.collect()
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(results, out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
