"""One LoRA run, cut afterwards: by its weights alone, by what its modules see, and by the loss."""

import time
from typing import Any

from peft import LoraConfig, get_peft_model

from benchmarks.study import Cell, Context
from benchmarks.summary import paired, shown, shown_paired, spread, table
from benchmarks.tasks import Task, evaluate, labelled, load, rows_of, train
from peft_dynamic import adapter_moments, resize_adapter

# How the components are chosen -> the arguments of resize_adapter, and whether modules share a budget
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({"cut": "plain"}, False),
    "inputs": ({"cut": "inputs"}, False),
    "loss": ({"cut": "loss"}, False),
    "plain, allocated": ({"cut": "plain"}, True),
    "loss, allocated": ({"cut": "loss"}, True),
}


def run(cell: Cell, context: Context) -> dict[str, Any]:
    settings = context.settings
    task, data = Task(**settings["tasks"][cell["task"]]), rows_of(cell["task"], context)
    base, task_type = load(task, cell["seed"], context.paths["models"])
    rank = settings["rank"]
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=list(task.targets), task_type=task_type)
    model: Any = get_peft_model(base, config)
    start = time.perf_counter()
    train(model, data, cell["steps"], cell["lr"], cell["seed"])
    trained = time.perf_counter()
    # further rows of the training file, in an order of their own
    calibration = map(labelled, data.batches(settings["calibration_batches"], cell["seed"] + 1000))
    moments = adapter_moments(model, calibration)
    measured = time.perf_counter()
    found: dict[str, dict[int, dict[str, float]]] = {"whole": {rank: evaluate(model, data.evaluation)}}
    whole = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    for arm, (how, shared) in ARMS.items():
        found[arm] = {}
        for b in settings["ranks"]:
            budget = {"parameters": whole * b // rank} if shared else {"rank": b}
            resize_adapter(model, "small", **budget, moments=moments, **how)
            model.set_adapter("small")
            found[arm][b] = evaluate(model, data.evaluation)
            model.set_adapter("default")
            model.delete_adapter("small")
    return {
        "curves": found,
        "train_seconds": round(trained - start, 1),
        "moments_seconds": round(measured - trained, 2),
        "tokens": moments.tokens,
    }


def report(rows: list[dict[str, Any]], context: Context) -> str:
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        ranks = [str(b) for b in context.settings["ranks"]]
        lines = []
        for arm in ARMS:
            losses = {b: {row["seed"]: row["curves"][arm][b]["loss"] for row in of_task} for b in ranks}
            plain = {b: {row["seed"]: row["curves"]["plain"][b]["loss"] for row in of_task} for b in ranks}
            cells = [shown(spread(losses[b].values()), 4) for b in ranks]
            against = [shown_paired(paired(losses[b], plain[b]), 4) if arm != "plain" else "" for b in ranks]
            lines.append([arm, *cells, *against])
        whole = shown(spread(next(iter(row["curves"]["whole"].values()))["loss"] for row in of_task), 4)
        seconds = [row["moments_seconds"] / row["train_seconds"] for row in of_task]
        head = [f"loss at {b}" for b in ranks] + [f"minus plain at {b}" for b in ranks]
        most = f"{100 * max(seconds):.1f} %"
        parts.append(
            f"### {task}\n\nThe whole adapter: {whole}. The moments took at most {most} of the training's time."
        )
        parts.append(table(["cut", *head], lines))
    return "\n\n".join(parts)
