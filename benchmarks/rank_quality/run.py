"""Quality by rank: one DyLoRA run against a LoRA run per rank, and against LoRA of the largest rank cut down."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from benchmarks.study import Cell, Context
from benchmarks.tasks import Data, Task, evaluate, load, rows_of, train
from peft_dynamic import DyLoRAConfig


def build(task: Task, method: dict[str, Any], cell: Cell, context: Context) -> torch.nn.Module:
    """The model with its adapter, in float32; everything runs under autocast to bfloat16."""
    base, task_type = load(task, cell["seed"], context.paths["models"])
    rank, scale = cell["rank"], method.get("scale")
    common: dict[str, Any] = {
        "task_type": task_type,
        "target_modules": list(task.targets),
        "lora_alpha": 16 if scale is None else scale * rank,
    }
    if "dylora" not in method:
        return get_peft_model(base, LoraConfig(r=rank, **common))
    ranks = context.settings["ranks"]
    config = DyLoRAConfig(r=rank, ranks=ranks, rank_seed=cell["seed"], **method["dylora"], **common)
    return get_peft_model(base, config)


@contextmanager
def cut(model: torch.nn.Module, rank: int, how: str) -> Iterator[None]:
    """LoRA with fewer components: the first ones ("index"), or the leading ones of the singular values ("svd")."""
    pairs = [
        (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
    ]
    whole = [(a.data, b.data) for a, b in pairs]
    for a, b in pairs:
        if how == "svd":
            q_b, r_b = torch.linalg.qr(b.data)
            q_a, r_a = torch.linalg.qr(a.data.T)
            u, s, vh = torch.linalg.svd(r_b @ r_a.T)
            b.data, a.data = q_b @ u * s, vh @ q_a.T
        a.data, b.data = a.data[:rank].contiguous(), b.data[:, :rank].contiguous()
    yield
    for (a, b), (whole_a, whole_b) in zip(pairs, whole, strict=True):
        a.data, b.data = whole_a, whole_b


def curves(
    model: torch.nn.Module, dynamic: bool, rank: int, ranks: list[int], data: Data, all_ranks: bool
) -> dict[str, Any]:
    """Evaluation by way of getting a rank ("trained", "index", "svd") and by rank."""
    if dynamic:
        by_rank = {}
        for b in ranks:
            with model.at_rank(b):
                by_rank[b] = evaluate(model, data.evaluation)
        return {"trained": by_rank}
    result = {"trained": {rank: evaluate(model, data.evaluation)}}
    if all_ranks and rank == ranks[-1]:
        for how in ("index", "svd"):
            result[how] = {}
            for b in ranks[:-1]:
                with cut(model, b, how):
                    result[how][b] = evaluate(model, data.evaluation)
            result[how][rank] = result["trained"][rank]
    return result


def run(cell: Cell, context: Context) -> dict[str, Any]:
    task, method = Task(**context.settings["tasks"][cell["task"]]), context.settings["methods"][cell["method"]]
    data = rows_of(cell["task"], context)
    start = time.perf_counter()
    model = build(task, method, cell, context)
    step_ms = train(model, data, cell["steps"], cell["lr"], cell["seed"])
    trained = time.perf_counter()
    config = model.peft_config["default"]
    reported = cell["seed"] != context.settings["tune_seed"]
    return {
        "curves": curves(model, "dylora" in method, cell["rank"], context.settings["ranks"], data, all_ranks=reported),
        "step_ms": round(step_ms, 1),
        "train_seconds": round(trained - start, 1),
        "setting": asdict(task),
        "adapter": {
            field: getattr(config, field, None) for field in ("lora_alpha", "truncation", "scaling", "rank_sampling")
        },
    }
