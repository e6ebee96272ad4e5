"""LoRA, LoRA-FA, LoRA-XS and LaMDA at equal steps: score, numbers updated, and bytes held for the backward pass."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora.layer import LoraLayer

from benchmarks.study import Cell, Context
from benchmarks.tasks import Batch, Task, evaluate, load, logits_and_labels, loss_of, rows_of, train
from peft_dynamic import MoSLoRAConfig


def build(task: Task, cell: Cell, context: Context) -> tuple[Any, torch.optim.Optimizer | None]:
    """The model, and an optimizer where it is not AdamW."""
    base, task_type = load(task, cell["seed"], context.paths["models"])
    arm = dict(context.settings["arms"][cell["arm"]])
    optimizer, common = arm.pop("optimizer", None), {"task_type": task_type, "target_modules": list(task.targets)}
    if "freeze_b" in arm:
        steps = {"total_steps": cell["steps"]} if arm["freeze_b"] else {}
        return get_peft_model(base, MoSLoRAConfig.lamda(**arm, **steps, **common)), None
    model = get_peft_model(base, LoraConfig(**arm, **common))
    if optimizer is None:
        return model, None
    return model, create_lorafa_optimizer(model, arm["r"], arm["lora_alpha"], cell["lr"])


def updated(model: Any, frozen: tuple[str, ...] = ()) -> int:
    """Numbers that the optimizer moves, without the head's."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name]
    return sum(p.numel() for name, p in named if not any(part in name for part in frozen))


@contextmanager
def in_adapters(model: Any) -> Iterator[Any]:
    """Gives a function that tells whether a LoRA layer is computing, outside the layer that it adapts."""
    depth = 0

    def mover(by: int) -> Any:
        def move(*_: Any) -> None:
            nonlocal depth
            depth += by

        return move

    with ExitStack() as stack:
        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            for module, by in ((layer, 1), (layer.get_base_layer(), -1)):
                stack.callback(module.register_forward_pre_hook(mover(by)).remove)
                stack.callback(module.register_forward_hook(mover(-by)).remove)
        yield lambda: depth > 0


def held(model: Any, batch: Batch) -> dict[str, int]:
    """Bytes that a training pass keeps for its backward pass, each tensor's memory once, without the parameters'.

    Under autocast the bfloat16 copies of weights are among them. "adapters": those that a LoRA layer keeps.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[str, dict[int, int]] = {"all": {}, "adapters": {}}
    model.train()
    with in_adapters(model) as is_inside:

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                for name in ("all", "adapters") if is_inside() else ("all",):
                    sizes[name][storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(*logits_and_labels(model, batch))
    del loss  # what it holds was counted while none of it could be freed
    return {name: sum(found.values()) for name, found in sizes.items()}


def run(cell: Cell, context: Context) -> dict[str, Any]:
    task, data = Task(**context.settings["tasks"][cell["task"]]), rows_of(cell["task"], context)
    rows = data.tuning if cell["seed"] == context.settings["tune_seed"] else data.evaluation
    start = time.process_time()
    model, optimizer = build(task, cell, context)
    freezes = context.settings["arms"][cell["arm"]].get("freeze_b", 0) > 0
    parameters = {"at_first": updated(model), "at_last": updated(model, ("lora_B",) if freezes else ())}
    memory = held(model, next(data.batches(1, seed=0)))
    step_ms = train(model, data, cell["steps"], cell["lr"], cell["seed"], optimizer)
    return {
        **evaluate(model, rows, task.metric),
        "parameters": parameters,
        "held_bytes": memory,
        "step_ms": round(step_ms, 1),
        "cpu_s": round(time.process_time() - start, 1),
    }
