"""What a teacher costs: labels' loss and divergence from two models' states, and whole training steps.

The head's parts have random states of SmolLM2's shape and a frozen head: forward and backward of the loss alone. TRL's
is `ChunkedDivergenceFunction` of its DistillationTrainer, without a loss of labels. The steps are those of KDSFTTrainer
on SmolLM2's first half with a LoRA, on batches of 4 instructions: forward, backward, AdamW.
"""

import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from benchmarks.study import Cell, Context
from benchmarks.summary import table
from benchmarks.tasks import read
from benchmarks.timing import in_turn, memory_of, peak_memory, ratios, shown_quartiles, shown_ratio
from peft_dynamic.functional.exit_loss import exit_losses
from peft_dynamic.functional.kd_loss import Distillation, Head, States, TopK, kd_losses
from peft_dynamic.trainers import KDSFTConfig, KDSFTTrainer, cache_teacher, truncate_to_exit

HEAD = {
    "trl": "divergence by TRL, in chunks",
    "full": "labels and divergence, all logits of both",
    "ours": "labels and divergence, ours",
    "ours-hot": "the same at temperature 2",
    "top-64": "the same from 64 cached tokens",
    "labels": "labels alone, ours",
}
STEP = {
    "labels": "labels alone",
    "live": "a teacher in memory",
    "states": "its cached states",
    "top-k": "its 64 cached tokens",
}
VOCABULARY, WIDTH = 49152, 576
MEMORY_STEPS = 2


def head_calls(tokens: int) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, tokens, WIDTH, requires_grad=True), torch.randn(tokens, WIDTH)
    own, theirs = torch.randn(VOCABULARY, WIDTH) * 0.05, torch.randn(VOCABULARY, WIDTH) * 0.05
    labels = torch.randint(VOCABULARY, (tokens,))

    def ours(taught: Any, temperature: float = 1.0) -> None:
        kd_losses(student, labels, Head(own), Distillation(taught, 0.5, temperature)).loss.backward()

    def full() -> None:
        z = linear(student[0], own)
        with torch.no_grad():
            q = log_softmax(linear(teacher, theirs), 1)
        kd = kl_div(log_softmax(z, 1), q, reduction="batchmean", log_target=True)
        (0.5 * cross_entropy(z, labels) + 0.5 * kd).backward()

    def trl() -> None:
        each, _ = ChunkedDivergenceFunction.apply(student[0], own, None, teacher, theirs, None, 0.0)
        each.sum().backward()

    def cached() -> TopK:
        with torch.no_grad():
            best = log_softmax(linear(teacher, theirs), 1).topk(64)
        return TopK(best.indices, best.values)

    kept: list[TopK] = []

    def top_64() -> None:
        if not kept:
            kept.append(cached())
        ours(kept[0])

    taught = States(teacher, Head(theirs))
    return {
        "trl": trl,
        "full": full,
        "ours": lambda: ours(taught),
        "ours-hot": lambda: ours(taught, 2.0),
        "top-64": top_64,
        "labels": lambda: exit_losses(student, labels, own).loss.backward(),
    }


def head_memory(name: str, tokens: int) -> float:
    calls = head_calls(8)  # what is loaded on the first call is not counted
    calls[name]()
    call = head_calls(tokens)[name]
    return peak_memory(call)


def trainer(kind: str, folder: Path, data: Path, models: Path, layers: int) -> KDSFTTrainer:
    rows = [
        {"prompt": "\n".join(filter(None, (row["instruction"], row["input"]))) + "\n\n", "completion": row["output"]}
        for row in read(data / "alpaca/train_alpaca.jsonl")[:12]  # three batches
    ]
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(models / "smollm2", dtype=torch.float32)
    common = {"max_length": 256, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "report_to": []}
    config = KDSFTConfig(str(folder), **common)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(models / "smollm2")

    def made(who: Any) -> KDSFTTrainer:
        student = truncate_to_exit(teacher, layers)
        more = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer, "peft_config": lora}
        return KDSFTTrainer(student, who, config, **more)

    if kind in ("states", "top-k"):
        cache = folder / kind
        loader = made(None).get_train_dataloader()
        batches = [batch for batch, _ in zip(loader, range(3), strict=False)]
        cache_teacher(teacher, batches, cache, kind.replace("-", "_"), processing_class=tokenizer)
        return made(f"cache:{cache}")
    return made(teacher if kind == "live" else None)


def stepper(made: KDSFTTrainer) -> Callable[[], None]:
    torch.manual_seed(0)
    loader = made.get_train_dataloader()
    turn = cycle([dict(batch) for batch, _ in zip(loader, range(3), strict=False)])
    made.create_optimizer()
    optimizer: Any = made.optimizer
    made.state.max_steps = 100

    def step() -> None:
        batch = dict(next(turn))
        made.training_step(made.model, batch, (batch["labels"][:, 1:] != -100).sum())
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_memory(kind: str, data: Path, models: Path, layers: int) -> float:
    """MiB above an empty process that has its modules: the models count."""
    with tempfile.TemporaryDirectory() as folder:

        def work() -> None:
            step = stepper(trainer(kind, Path(folder), data, models, layers))
            for _ in range(MEMORY_STEPS):
                step()

        return peak_memory(work)


def run(cell: Cell, context: Context) -> dict[str, Any]:
    return {"parts": {cell["part"]: measured(cell["part"], context)}}


def measured(part: str, context: Context) -> dict[str, Any]:
    settings, paths = context.settings, context.paths
    if part == "head-time":
        return ratios(in_turn(head_calls(settings["tokens"]), settings["rounds"], time.process_time), "trl")
    if part == "head-memory":
        return memory_of(head_memory, HEAD, "trl", settings["tokens"])
    where = (paths["data"], paths["models"], settings["student_layers"])
    if part == "step-memory":
        return memory_of(step_memory, ["labels", "live"], "labels", *where)
    with tempfile.TemporaryDirectory() as folder:
        steps = {kind: stepper(trainer(kind, Path(folder), *where)) for kind in STEP}
        return ratios(in_turn(steps, settings["rounds"], time.process_time), "labels")


def report(record: dict[str, Any], context: Context) -> str:
    found = record["parts"]
    parts = []
    for kind, names, reference in (("head", HEAD, "TRL's"), ("step", STEP, "labels alone")):
        times, memory = found.get(f"{kind}-time", {}), found.get(f"{kind}-memory", {})
        lines = [
            [
                what,
                shown_ratio(times.get(name), "seconds_mean", 2),
                shown_ratio(times.get(name), "ratio_median", 2),
                shown_quartiles(times.get(name), 2),
                "" if name not in memory else f"{memory[name]['mib']:.0f}",
                "" if name not in memory else f"{memory[name]['ratio']:.2f}",
            ]
            for name, what in names.items()
        ]
        header = [kind, "CPU s", f"over {reference}", "quartiles", "MiB more", f"over {reference}"]
        parts.append(table(header, lines, right=[1, 2, 4, 5]))
    return "\n\n".join(parts)
