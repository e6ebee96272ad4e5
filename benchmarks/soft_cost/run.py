"""What eight exits cost: a step of SoFTTrainer beside one of SFTTrainer, which computes the full depth's loss alone.

Both trainers get the same batches of 4 instructions, the instruction's tokens without labels, and take whole steps:
forward, backward, AdamW. Steps are timed in turn in one process, peak memory in a process for each.
"""

import statistics
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.study import Cell, Context
from benchmarks.summary import table
from benchmarks.tasks import read
from benchmarks.timing import WARM_UP, in_own_process, in_turn, peak_memory, ratios, shown_quartiles, shown_ratio
from peft_dynamic.trainers import SoFTConfig, SoFTTrainer

# TRL's defaults are bf16=True (autocast; the weights are float32) and gradient_checkpointing=True.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "float32": {"bf16": False},
    "lora": {"lora": True},
}
BATCHES = 4
MEMORY_STEPS = 3  # the third batch is the largest


def trainer(kind: str, setting: str, folder: str, data: Path, models: Path) -> Any:
    rows = [
        {"prompt": "\n".join(filter(None, (row["instruction"], row["input"]))) + "\n\n", "completion": row["output"]}
        for row in read(data / "alpaca/train_alpaca.jsonl")[:80]
    ]
    more = dict(SETTINGS[setting])
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if more.pop("lora", False) else None
    common = {"max_length": 256, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], **more}
    model = AutoModelForCausalLM.from_pretrained(models / "smollm2", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(models / "smollm2")
    kinds: dict[str, tuple] = {"sft": (SFTTrainer, SFTConfig), "soft": (SoFTTrainer, SoFTConfig)}
    trains, configures = kinds[kind]
    return trains(
        model,
        configures(folder, **common),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
    )


def stepper(made: Any) -> tuple[Callable[[], None], list[dict[str, Any]]]:
    """A whole training step on the next of a few batches."""
    torch.manual_seed(0)
    loader = iter(made.get_train_dataloader())
    batches = [dict(next(loader)) for _ in range(BATCHES)]
    made.create_optimizer()
    made.model.gradient_checkpointing_enable()
    turn = cycle(batches)

    def step() -> None:
        batch = dict(next(turn))
        made.training_step(made.model, batch, (batch["labels"][:, 1:] != -100).sum())
        made.optimizer.step()
        made.optimizer.zero_grad()

    return step, batches


def grown(kind: str, setting: str, data: Path, models: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        step, _ = stepper(trainer(kind, setting, folder, data, models))
        return peak_memory(lambda: [step() for _ in range(MEMORY_STEPS)])


def run(cell: Cell, context: Context) -> dict[str, Any]:
    setting, where = cell["setting"], (context.paths["data"], context.paths["models"])
    if cell["part"] == "memory":
        peaks: dict[str, Any] = {
            kind: [in_own_process(grown, kind, setting, *where) for _ in range(context.settings["memory_runs"])]
            for kind in ("sft", "soft")
        }
        middle = {kind: statistics.median(values) for kind, values in peaks.items()}
        return {"settings": {setting: {"peak_mib": peaks | {"ratio_of_medians": middle["soft"] / middle["sft"]}}}}
    with tempfile.TemporaryDirectory() as folder:
        made = {kind: stepper(trainer(kind, setting, folder, *where)) for kind in ("sft", "soft")}
        times = in_turn({kind: step for kind, (step, _) in made.items()}, context.settings["rounds"])
    batches = made["sft"][1]
    found = {
        "time": ratios(times, "sft"),
        "repeats": context.settings["rounds"],
        "warm_up": WARM_UP,
        "tokens": [batch["input_ids"].numel() for batch in batches],
        "labelled": [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches],
    }
    return {"settings": {setting: found}}


def report(record: dict[str, Any], context: Context) -> str:
    lines = []
    for setting, found in record["settings"].items():
        if not found:
            continue
        taken = found.get("time", {}).get("soft")
        cells = [shown_ratio(taken, "ratio_of_means"), shown_ratio(taken), shown_quartiles(taken)]
        lines.append([setting, *cells, shown_ratio(found.get("peak_mib"), "ratio_of_medians")])
    return table(["SoFT over SFT", "mean of a step", "median", "quartiles", "peak memory"], lines)
