"""Citation training of SmolLM2 (decoder) and a Flan-T5-small (FiD): each answers before and after, with three seeds."""

import random
import resource
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from benchmarks.citation_quality.rows import Row, rows
from benchmarks.study import Cell, Context
from benchmarks.training import adamw, descended, fit
from peft_dynamic.trainers.citation.collators import CitationDataCollator, FiDDataCollator
from peft_dynamic.trainers.citation.fid import FiDForConditionalGeneration


def load(kind: str, models: Path, seed: int | None) -> tuple[Any, Any, Any]:
    """Model, tokenizer and collator; with a seed, ready to train."""
    set_seed(seed or 0)
    if kind == "fid":
        tokenizer = AutoTokenizer.from_pretrained(models / "t5")
        model = FiDForConditionalGeneration.from_pretrained(models / "t5", dtype=torch.float32)
        return model, tokenizer, FiDDataCollator(tokenizer, max_length=256)
    tokenizer = AutoTokenizer.from_pretrained(models / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(models / "smollm2", dtype=torch.float32, attn_implementation="eager")
    if seed is not None:
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    return model, tokenizer, CitationDataCollator(tokenizer, "alce", max_length=768)


def loss_of(model: Any, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The sum over the answer's tokens; only at these does the decoder make logits."""
    labels = batch["labels"]
    if kind == "decoder":
        labels = labels[:, int((labels != -100).int().argmax()) - 1 :]
        batch = {**batch, "labels": labels, "logits_to_keep": labels.shape[1], "use_cache": False}
    with torch.autocast("cpu", torch.bfloat16):
        return model(**batch).loss * (labels != -100).sum()


def train(kind: str, model: Any, collator: Any, train_rows: list[Row], seed: int, context: Context) -> dict[str, Any]:
    options, rng = context.settings, random.Random(seed)
    chosen = [
        row
        for name, count in options["rows"].items()
        for row in rng.sample([row for row in train_rows if row["kind"] == name], count)
    ]
    order = [row for _ in range(options["epochs"][kind]) for row in rng.sample(chosen, len(chosen))]
    size = options["batch"]
    steps = len(order) // size
    optimizer = adamw(model.parameters(), options["lr"])
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)

    def backward(some: list[Row]) -> float:
        batches = [collator([row]) for row in some]  # no padding on two cores
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        return sum(descended(loss_of(model, batch, kind) / tokens) for batch in batches)

    def say(step: int, loss: float) -> None:
        print(f"{kind} seed {seed} step {step}/{steps} loss {loss:.3f}", flush=True)

    start = time.process_time()
    model.train()
    taken = fit(optimizer, schedule, (order[i * size : (i + 1) * size] for i in range(steps)), backward, say=say)
    seconds = time.process_time() - start
    losses = [round(step.loss, 4) for step in taken]
    return {"rows": steps * size, "cpu_seconds_per_row": seconds / (steps * size), "losses": losses}


@torch.no_grad()
def answers(
    kind: str, model: Any, tokenizer: Any, collator: Any, questions: list[Row], new_tokens: int
) -> tuple[list[str], float]:
    """Greedy answers, four questions at a time, and the CPU seconds per question."""
    model.eval()
    start, out = time.process_time(), []
    for i in range(0, len(questions), 4):
        batch = collator([{k: row[k] for k in ("question", "passages")} for row in questions[i : i + 4]])
        given = 0 if kind == "fid" else batch["input_ids"].shape[1]
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "decoder"):
            made = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
        out += [text.strip() for text in tokenizer.batch_decode(made[:, given:], skip_special_tokens=True)]
        print(f"{len(out)} of {len(questions)} answered: {out[-1][:150]!r}", flush=True)
    return out, (time.process_time() - start) / len(questions)


@cache
def rows_of(data: Path) -> tuple[list[Row], list[Row], str]:
    return rows(data)


def run(cell: Cell, context: Context) -> dict[str, Any]:
    train_rows, questions, _ = rows_of(context.paths["data"])
    questions = questions[: context.settings["questions"] or None]
    kind, seed = cell["model"], cell["seed"] if cell["training"] == "after" else None
    model, tokenizer, collator = load(kind, context.paths["models"], seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found: dict[str, Any] = {}
    if seed is not None:
        found |= {"train": train(kind, model, collator, train_rows, seed, context)}
        found |= {"train_mib_over_loaded": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before}
    texts, seconds = answers(kind, model, tokenizer, collator, questions, context.settings["new_tokens"])
    said = [{"id": row["id"], "output": text} for row, text in zip(questions, texts, strict=True)]
    return {**found, "answer_cpu_seconds_per_row": seconds, "answers": said}
