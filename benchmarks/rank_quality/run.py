"""Quality by rank: one DyLoRA run against a LoRA run per rank, and against LoRA of the largest rank cut down.

    PYTHONPATH=. python benchmarks/rank_quality/run.py --data DATA --models MODELS

DATA holds <task>/train.jsonl and <task>/validation.jsonl of sst2, mrpc, rte and e2e_nlg; MODELS holds the folders
minilm (sentence-transformers/all-MiniLM-L6-v2) and smollm2 (HuggingFaceTB/SmolLM2-135M-Instruct). Each run is one line
of runs.jsonl, written when it ends; runs that are there are skipped, so a stopped study goes on where it was.
report.py makes results.json and the plots from that file.
"""

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from benchmarks.tasks import Data, Task, evaluate, load, read, train

RUNS = Path(__file__).with_name("runs.jsonl")
RANKS = [1, 2, 4, 8, 16, 32]
SEEDS = [11, 12, 13]
TUNE_SEED = 5  # learning rates and alphas are chosen on it; it is not reported


@dataclass(frozen=True)
class Method:
    """An adapter configuration; its learning rates are in REPORTED."""

    dylora: dict[str, Any] | None = None  # arguments of DyLoRAConfig, or None for LoRA of one rank
    scale: float | None = None  # lora_alpha = scale * r instead of 16


TASKS = {
    "sst2": Task("minilm", ("query", "value"), 64, 200, 32, 400),
    "mrpc": Task("minilm", ("query", "value"), 80, 200, 16, 200),
    "rte": Task("minilm", ("query", "value"), 96, 40, 16, 200),
    "e2e_nlg": Task("smollm2", ("q_proj", "v_proj"), 128, 30, 8, 0, 48),
}
METHODS = {
    "lora": Method(),
    "lora-2r": Method(scale=2),
    "lora-r/2": Method(scale=0.5),
    "dylora": Method({}),
    "dylora-half": Method({"rank_sampling": [0.1, 0.1, 0.1, 0.1, 0.1, 0.5]}),
    "dylora-r": Method({}, scale=1),
    "dylora-2r": Method({}, scale=2),
    "dylora-2r-half": Method({"rank_sampling": [0.1, 0.1, 0.1, 0.1, 0.1, 0.5]}, scale=2),
    "dylora-2r-one": Method({"rank_sampling": [0.25, 0.1, 0.05, 0, 0, 0.6]}, scale=2),
    "dylora-paper": Method({"truncation": "prefix", "scaling": "alpha/b", "rank_sampling": "uniform"}),
}
# What is reported, with its learning rate; chosen with --tune, for the LoRA runs with their alpha (see LOG.md).
REPORTED = {
    "sst2": {"lora-r/2": 4e-3, "dylora": 4e-3, "dylora-half": 4e-3, "dylora-paper": 4e-3},
    "mrpc": {"lora": 2e-3, "dylora": 2e-3, "dylora-half": 2e-3, "dylora-paper": 2e-3},
    "rte": {"lora": 2e-3, "dylora": 2e-3, "dylora-paper": 2e-3},
    "e2e_nlg": {"lora": 8e-3, "dylora": 8e-3, "dylora-2r": 4e-3, "dylora-2r-half": 4e-3, "dylora-paper": 8e-3},
}


def build(task: Task, method: Method, rank: int, seed: int, models: Path) -> torch.nn.Module:
    """The model with its adapter, in float32; everything runs under autocast to bfloat16."""
    base, task_type = load(task, seed, models)
    common: dict[str, Any] = {
        "task_type": task_type,
        "target_modules": list(task.targets),
        "lora_alpha": 16 if method.scale is None else method.scale * rank,
    }
    if method.dylora is None:
        config = LoraConfig(r=rank, **common)
    else:
        from peft_dynamic import DyLoRAConfig

        config = DyLoRAConfig(r=rank, ranks=RANKS, rank_seed=seed, **method.dylora, **common)
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


def curves(model: torch.nn.Module, method: Method, rank: int, data: Data, all_ranks: bool) -> dict[str, Any]:
    """Evaluation by way of getting a rank ("trained", "index", "svd") and by rank."""
    if method.dylora is not None:
        by_rank = {}
        for b in RANKS:
            with model.at_rank(b):
                by_rank[b] = evaluate(model, data.evaluation)
        return {"trained": by_rank}
    result = {"trained": {rank: evaluate(model, data.evaluation)}}
    if all_ranks and rank == RANKS[-1]:
        for how in ("index", "svd"):
            result[how] = {}
            for b in RANKS[:-1]:
                with cut(model, b, how):
                    result[how][b] = evaluate(model, data.evaluation)
            result[how][rank] = result["trained"][rank]
    return result


def run(name: str, method_name: str, rank: int, seed: int, lr: float, data: Data, models: Path) -> None:
    """Train, evaluate and write a line, unless there is one."""
    task, method = TASKS[name], METHODS[method_name]
    key = {"task": name, "method": method_name, "rank": rank, "seed": seed, "lr": lr, "steps": task.steps}
    if RUNS.exists() and any(key.items() <= row.items() for row in read(RUNS)):
        return
    start = time.perf_counter()
    model = build(task, method, rank, seed, models)
    step_ms = train(model, data, task.steps, lr, seed)
    trained = time.perf_counter()
    config = model.peft_config["default"]
    row = {
        **key,
        "curves": curves(model, method, rank, data, all_ranks=seed != TUNE_SEED),
        "step_ms": round(step_ms, 1),
        "train_seconds": round(trained - start, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "setting": asdict(task),
        "adapter": {
            field: getattr(config, field, None) for field in ("lora_alpha", "truncation", "scaling", "rank_sampling")
        },
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with RUNS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = {
        how: [f"{b}: {point['loss']:.4f} {point['accuracy']:.3f}" for b, point in by_rank.items()]
        for how, by_rank in row["curves"].items()
    }
    print(json.dumps(key), shown, f"{step_ms:.0f} ms a step, {row['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: those of REPORTED")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--tune", nargs="+", type=float, metavar="LR", help="try these on the spare seed instead")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS, help="of the LoRA runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = {name: Data(name, TASKS[name], arguments.data, arguments.models) for name in arguments.tasks}
    for seed in [TUNE_SEED] if arguments.tune else arguments.seeds:
        for name, data in loaded.items():
            for method in arguments.methods or REPORTED[name]:
                for rank in arguments.ranks if METHODS[method].dylora is None else RANKS[-1:]:
                    for lr in arguments.tune or [REPORTED[name][method]]:
                        run(name, method, rank, seed, lr, data, arguments.models)


if __name__ == "__main__":
    main()
