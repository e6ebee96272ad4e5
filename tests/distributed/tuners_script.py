"""Each of the methods under Trainer, in one process or in two under an engine; writes what came out.

python tuners_script.py ENGINE OUT METHODS...

Five optimizer steps of two micro-batches each, with clipping, gradient checkpointing, rows of several lengths and an
evaluation. Then once more from the checkpoint of the third step.
"""

import gc
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.distributed.gloo import arguments, run_cells, use

ENGINE, OUT, *METHODS_ASKED = sys.argv[1:]
use(ENGINE)

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_dynamic.callbacks import RankCurveCallback
from tests.tuners.common import rows
from tests.tuners.methods import with_method

STEPS, LAST_SAVED = 5, 3
OF_THE_CLOCK = ("runtime", "per_second", "total_flos")


def drawn_rank(model: Any) -> int | None:
    """The rank of this step, of a method that draws one."""
    for module in model.modules():
        for state in getattr(module, "lora_views", {}).values():
            if hasattr(state, "schedule"):
                return getattr(state.schedule, "drawn", None)
    return None


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.ranks: list[int | None] = []
        self.logs: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.ranks.append(drawn_rank(model))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        measured = {name: value for name, value in logs.items() if not name.endswith(OF_THE_CLOCK)}
        self.logs.append({name: float(value) for name, value in measured.items()})


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def data() -> tuple[Dataset, Dataset]:
    """Rows of which each has another number of tokens in the loss; and four alike."""
    made = []
    for number, row in enumerate(rows(4 * STEPS).tolist()):
        first = number % 5
        made.append({"input_ids": row, "labels": [-100] * first + row[first:], "attention_mask": [1] * len(row)})
    alike = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in rows(4, seed=5).tolist()]
    return Dataset.from_list(made), Dataset.from_list(alike)


def in_order(value: Any) -> Any:
    """Lists sorted, since PEFT writes sets."""
    if isinstance(value, list):
        return sorted(map(in_order, value), key=repr)
    return {name: in_order(each) for name, each in value.items()} if isinstance(value, dict) else value


def train(method: str, folder: str, resume: bool) -> dict[str, Any]:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    settings = arguments(
        ENGINE,
        output_dir=folder,
        per_device_train_batch_size=max(2 // processes, 1),  # four rows a step, in two micro-batches where that goes
        per_device_eval_batch_size=4 // processes,
        gradient_accumulation_steps=4 // (max(2 // processes, 1) * processes),
        max_steps=STEPS,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # Adam divides by the root of tiny numbers, whose rounding would be all that is compared
        weight_decay=0.01,
        max_grad_norm=0.05,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=LAST_SAVED,
        save_steps=LAST_SAVED,
        save_total_limit=3,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    args = TrainingArguments(**settings)
    torch.manual_seed(0)
    model, watch = with_method(method, layers=1), Watch()
    train_rows, eval_rows = data()
    trainer = InOrder(model, args, train_dataset=train_rows, eval_dataset=eval_rows, callbacks=[watch])
    if method.startswith("dylora"):
        trainer.add_callback(RankCurveCallback([2, 8], trainer=trainer))
    trainer.remove_callback(next(c for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
    torch.manual_seed(100 + trainer.accelerator.process_index)  # ranks must not hang on a process's own generator
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{LAST_SAVED}" if resume else None)
    out = f"{folder}/{'resumed' if resume else 'whole'}"
    trainer.save_model(out)
    trainer.accelerator.wait_for_everyone()
    everywhere: list[Any] = [watch.ranks]
    if processes > 1:
        everywhere = [None] * processes
        dist.all_gather_object(everywhere, watch.ranks)
    assert all(ranks == everywhere[0] for ranks in everywhere), everywhere
    config = in_order(json.loads(Path(out, "adapter_config.json").read_text()))
    config.pop("adapters", None)  # each process has its sources in a folder of its own
    found = {
        "saved": load_file(f"{out}/adapter_model.safetensors"),
        "files": sorted(path.name for path in Path(out).iterdir()),
        "config": config,
        "ranks": watch.ranks,
        "logs": watch.logs,
        "type": trainer.accelerator.distributed_type.value,
        "processes": processes,
    }
    trainer.accelerator.free_memory()
    del trainer, model
    AcceleratorState._reset_state(reset_partial_state=False)
    gc.collect()
    return found


def both(method: str) -> dict[str, Any]:
    folder = f"{Path(OUT).with_suffix('')}-{method}"
    return {"whole": train(method, folder, False), "resumed": train(method, folder, True)}


if __name__ == "__main__":
    run_cells(OUT, {method: partial(both, method) for method in METHODS_ASKED})
