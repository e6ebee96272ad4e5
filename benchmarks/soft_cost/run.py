"""What eight exits cost: a step of SoFTTrainer beside one of SFTTrainer, which computes the full depth's loss alone.

    PYTHONPATH=. python benchmarks/soft_cost/run.py --data DATA --models MODELS

DATA holds alpaca/train_alpaca.jsonl, MODELS the folder smollm2 (SmolLM2-135M-Instruct: 30 layers, 49152 tokens). Both
trainers get the same batches of 4 instructions, the instruction's tokens without labels, and take whole steps: forward,
backward, AdamW. Steps are timed in turn in one process, peak memory in a process for each. Writes results.json.
`--settings` and `--parts` do some of it.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.tasks import read
from benchmarks.timing import WARM_UP, in_turn, peak_memory, printed_by, ratios
from peft_dynamic.trainers import SoFTConfig, SoFTTrainer

RESULTS = Path(__file__).with_name("results.json")
# TRL's defaults are bf16=True (autocast; the weights are float32) and gradient_checkpointing=True.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "float32": {"bf16": False},
    "lora": {"lora": True},
}
BATCHES = 4
MEMORY_RUNS, MEMORY_STEPS = 3, 3  # the third batch is the largest


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--parts", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "SETTING"), help="print one peak; what this script starts")
    options = parser.parse_args()
    where = options.data, options.models
    with tempfile.TemporaryDirectory() as folder:
        if options.peak:
            step, _ = stepper(trainer(*options.peak, folder, *where))
            print(peak_memory(lambda: [step() for _ in range(MEMORY_STEPS)]))
            return
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"settings": {}}
        results["machine"] = f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}"
        for setting in options.settings:
            found = results["settings"].setdefault(setting, {})
            if "time" in options.parts:
                made = {kind: stepper(trainer(kind, setting, folder, *where)) for kind in ("sft", "soft")}
                times = in_turn({kind: step for kind, (step, _) in made.items()}, options.repeats)
                batches = made["sft"][1]
                found |= {
                    "time": ratios(times, "sft"),
                    "repeats": options.repeats,
                    "warm_up": WARM_UP,
                    "tokens": [batch["input_ids"].numel() for batch in batches],
                    "labelled": [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches],
                }
            if "memory" in options.parts:
                place = ("--data", str(where[0]), "--models", str(where[1]), "--peak")
                peaks = {
                    kind: [printed_by(__file__, *place, kind, setting) for _ in range(MEMORY_RUNS)]
                    for kind in ("sft", "soft")
                }
                middle = {kind: statistics.median(values) for kind, values in peaks.items()}
                found["peak_mib"] = peaks | {"ratio_of_medians": middle["soft"] / middle["sft"]}
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
