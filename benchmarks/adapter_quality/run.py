"""Quality of MoSLoRA and LoRETTA against PEFT's LoRA and DoRA, at equal steps, batches and seeds.

    PYTHONPATH=. python benchmarks/adapter_quality/run.py --data DATA --models MODELS --tune 1e-3 2e-3 4e-3 8e-3
    PYTHONPATH=. python benchmarks/adapter_quality/run.py --data DATA --models MODELS

DATA holds <task>/train.jsonl and <task>/validation.jsonl of sst2, mrpc, rte, cola, stsb and commonsense; MODELS holds
the folders minilm (sentence-transformers/all-MiniLM-L6-v2) and smollm2 (HuggingFaceTB/SmolLM2-135M-Instruct).

The first command tries each learning rate for each method and task on a spare seed, scored on training rows that no
run trains on; the second trains five other seeds at the rate that scored best there (--rates names a JSON file, {task:
{method: rate}}, to use instead) and evaluates on other rows. Each run is one line of runs.jsonl, written when it ends;
runs that are there are skipped, so a stopped study goes on where it was. report.py makes results.json and the plots.
"""

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.tasks import Data, Task, evaluate, load, read, train

RUNS = Path(__file__).with_name("runs.jsonl")
SEEDS = [11, 12, 13, 14, 15]
TUNE_SEED = 5  # learning rates are chosen on it; it is not reported
HEADS = ("classifier", "score")  # modules whose parameters are counted as the head, for every method


@dataclass(frozen=True)
class Setting(Task):
    """A task with its score, and the rows that learning rates are chosen on."""

    metric: str = "accuracy"
    tune_rows: int = 400


TASKS = {
    "sst2": Setting("minilm", ("query", "value"), 64, 200, 32, 0),
    "mrpc": Setting("minilm", ("query", "value"), 80, 200, 16, 0),
    "rte": Setting("minilm", ("query", "value"), 96, 200, 16, 200, tune_rows=200),
    "cola": Setting("minilm", ("query", "value"), 48, 300, 32, 0, metric="matthews"),
    "stsb": Setting("minilm", ("query", "value"), 64, 200, 16, 0, 750, metric="correlation"),
    "commonsense": Setting("smollm2", ("q_proj", "v_proj"), 256, 60, 8, 0, 350, tune_rows=200),
}
LONG = {"sst2-long": 500, "mrpc-long": 500, "stsb-long": 500}  # the same tasks with more steps
TASKS |= {name: replace(TASKS[name.removesuffix("-long")], steps=steps) for name, steps in LONG.items()}


def ours(name: str, **arguments: Any) -> Callable[..., Any]:
    """A configuration of peft_dynamic, imported when it is made."""

    def make(**common: Any) -> Any:
        import peft_dynamic

        return getattr(peft_dynamic, name)(**arguments, **common)

    return make


def lora(**arguments: Any) -> Callable[..., Any]:
    return lambda **common: LoraConfig(r=8, **arguments, **common)


@dataclass(frozen=True)
class Method:
    """An adapter: what makes its configuration, whether that takes target modules and lora_alpha, and which modules."""

    config: Callable[..., Any]
    targeted: bool = True
    alpha: int = 16
    everywhere: bool = False  # all linear layers in place of the task's target modules


SMALL = {"bottleneck": 8, "tensor_rank": 4, "train_layer_norms": False, "tensorize_classifier": False}
METHODS = {
    "lora": Method(lora()),
    "dora": Method(lora(use_dora=True)),
    "moslora": Method(ours("MoSLoRAConfig", r=8, mixer_init="kaiming")),
    "moslora-orthogonal": Method(ours("MoSLoRAConfig", r=8, mixer_init="orthogonal")),
    "moslora-butterfly": Method(ours("MoSLoRAConfig", r=8, mixer_init="butterfly")),
    "loretta-rep": Method(ours("LorettaRepConfig", bottleneck=8, tensor_rank=5)),
    # Fewer parameters: the tensor trains alone. In a small model the layer norms are more numbers than these.
    "loretta-rep-small": Method(ours("LorettaRepConfig", **SMALL)),
    "loretta-rep-small-noise": Method(ours("LorettaRepConfig", init_weights="noise_removal", **SMALL)),
    "loretta-rep-small-8": Method(ours("LorettaRepConfig", **SMALL), alpha=64),
    "lora-all": Method(lora(), everywhere=True),
    "loretta-rep-all-noise": Method(
        ours("LorettaRepConfig", init_weights="noise_removal", **SMALL | {"tensor_rank": 5}), everywhere=True
    ),
    "loretta-adp": Method(ours("LorettaAdpConfig", bottleneck=64, tensor_rank=5), targeted=False),
}


def build(task: Setting, method: Method, seed: int, models: Path) -> torch.nn.Module:
    """The model with its adapter, in float32; everything runs under autocast to bfloat16."""
    base, task_type = load(task, seed, models, num_labels=1 if task.metric == "correlation" else 2)
    targets = "all-linear" if method.everywhere else list(task.targets)
    common = {"target_modules": targets, "lora_alpha": method.alpha} if method.targeted else {}
    return get_peft_model(base, method.config(task_type=task_type, **common))


def trainable(model: torch.nn.Module) -> dict[str, int]:
    counts = {"with_head": 0, "without_head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["with_head"] += parameter.numel()
            if not {*HEADS} & {*name.split(".")}:
                counts["without_head"] += parameter.numel()
    return counts


def run(name: str, method: str, seed: int, lr: float, data: Data, models: Path, runs: Path) -> None:
    """Train, evaluate and write a line, unless there is one."""
    task = TASKS[name]
    key = {"task": name, "method": method, "seed": seed, "lr": lr, "steps": task.steps}
    if runs.exists() and any(key.items() <= row.items() for row in read(runs)):
        return
    start = time.perf_counter()
    model = build(task, METHODS[method], seed, models)
    step_ms = train(model, data, task.steps, lr, seed)
    trained = time.perf_counter()
    tunes = seed == TUNE_SEED
    result = evaluate(model, data.tuning if tunes else data.evaluation, task.metric)
    row = {
        **key,
        "score": result[task.metric],
        "loss": result["loss"],
        "evaluated_on": "tuning rows" if tunes else "evaluation rows",
        "parameters": trainable(model),
        "step_ms": round(step_ms, 1),
        "train_seconds": round(trained - start, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "setting": asdict(task),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with runs.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = f"{task.metric} {row['score']:.4f}, loss {row['loss']:.4f}, {row['parameters']['without_head']} parameters"
    print(json.dumps(key), shown, f"{step_ms:.0f} ms a step, {row['seconds']} s", flush=True)


def chosen(name: str, method: str, runs: Path) -> float:
    """The rate of the best score on the spare seed; of equal ones, that of the least loss."""
    key = {"task": name, "method": method, "seed": TUNE_SEED, "steps": TASKS[name].steps}
    tried = [row for row in read(runs) if key.items() <= row.items()] if runs.exists() else []
    if not tried:
        raise SystemExit(f"no learning rate for {method} on {name}: run with --tune first, or give --rates")
    return min(tried, key=lambda row: (-row["score"], row["loss"]))["lr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[name for name in TASKS if name not in LONG])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--tune", nargs="+", type=float, metavar="LR", help="try these on the spare seed instead")
    parser.add_argument("--rates", type=Path, help="JSON of {task: {method: rate}}; default: the best of --tune")
    parser.add_argument("--runs", type=Path, default=RUNS, help="the file of lines")
    args = parser.parse_args()
    if TUNE_SEED in args.seeds:
        parser.error(f"seed {TUNE_SEED} is the one that learning rates are chosen on")
    torch.set_num_threads(1)
    loaded = {
        name: Data(name.removesuffix("-long"), TASKS[name], args.data, args.models, TASKS[name].tune_rows)
        for name in dict.fromkeys(args.tasks)
    }
    given = json.loads(args.rates.read_text(encoding="utf-8")) if args.rates else None
    rates = {
        (name, method): args.tune or [given[name][method] if given else chosen(name, method, args.runs)]
        for name in loaded
        for method in args.methods
    }
    for seed in [TUNE_SEED] if args.tune else args.seeds:
        for (name, method), each in rates.items():
            for lr in each:
                run(name, method, seed, lr, loaded[name], args.models, args.runs)


if __name__ == "__main__":
    main()
