"""MoSLoRA and LoRETTA against PEFT's LoRA and DoRA, at equal steps, batches and seeds.

The rate of each method is chosen with --tune on a spare seed, scored on training rows that no run trains on; the
reported seeds are evaluated on other rows.
"""

import time
from dataclasses import asdict
from functools import cache
from typing import Any

import peft
import torch

import peft_dynamic
from benchmarks.study import Cell, Context
from benchmarks.tasks import Data, Task, evaluate, load, train

HEADS = ("classifier", "score")  # modules whose parameters are counted as the head, for every method


def adapted(base: torch.nn.Module, task_type: str, method: dict[str, Any], targets: list[str]) -> torch.nn.Module:
    """The model with the adapter of `[settings.methods]`."""
    method = {"targets": "task", "lora_alpha": 16} | method
    name, where = method.pop("config"), method.pop("targets")
    if where == "none":
        del method["lora_alpha"]
    else:
        method["target_modules"] = list(targets) if where == "task" else where
    config = getattr(peft_dynamic, name, None) or getattr(peft, name)
    return peft.get_peft_model(base, config(task_type=task_type, **method))


def trainable(model: torch.nn.Module) -> dict[str, int]:
    counts = {"with_head": 0, "without_head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["with_head"] += parameter.numel()
            if not {*HEADS} & {*name.split(".")}:
                counts["without_head"] += parameter.numel()
    return counts


def task_of(name: str, context: Context) -> Task:
    return Task(**context.settings["tasks"][name.removesuffix("-long")])


@cache
def rows_of(name: str, context: Context) -> Data:
    return Data(name, task_of(name, context), context.paths["data"], context.paths["models"])


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Everything runs in float32 under autocast to bfloat16."""
    task, data = task_of(cell["task"], context), rows_of(cell["task"].removesuffix("-long"), context)
    start = time.perf_counter()
    labels = 1 if task.metric == "correlation" else 2
    base, task_type = load(task, cell["seed"], context.paths["models"], num_labels=labels)
    model = adapted(base, task_type, context.settings["methods"][cell["method"]], task.targets)
    step_ms = train(model, data, cell["steps"], cell["lr"], cell["seed"])
    trained = time.perf_counter()
    tunes = cell["seed"] == context.settings["tune_seed"]
    result = evaluate(model, data.tuning if tunes else data.evaluation, task.metric)
    return {
        "score": result[task.metric],
        "loss": result["loss"],
        "evaluated_on": "tuning rows" if tunes else "evaluation rows",
        "parameters": trainable(model),
        "step_ms": round(step_ms, 1),
        "train_seconds": round(trained - start, 1),
        "setting": asdict(task),
    }
