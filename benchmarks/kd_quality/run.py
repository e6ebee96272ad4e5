"""Students of three layers that learn from labels, smoothed labels, or a teacher of six, at equal steps and batches.

The teacher is trained once for a task, on all of its labels as they are, and its logits are cached. All runs of a seed
see the same batches, but for arm C, where plain training has fewer rows. Float32, the last weights, no choice by
evaluation rows.
"""

import tempfile
import time
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup, set_seed

from benchmarks.study import Cell, Context
from benchmarks.tasks import Batch, Data, rows_of
from benchmarks.training import adamw, descended, fit
from peft_dynamic.trainers import Distiller, KDConfig, cache_teacher


def model_of(context: Context, seed: int, layers: int | None = None, pretrained: bool = True) -> Any:
    """The classifier, without dropout; of `layers` layers, which are the first of the pretrained model."""
    set_seed(seed)  # of the new head, and of random weights
    folder = context.paths["models"] / "minilm"
    more: dict[str, Any] = {"num_labels": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **more)
    if not pretrained:
        set_seed(seed)
        model = type(model)(model.config)
    if layers is not None:
        del model.bert.encoder.layer[layers:]
        model.config.num_hidden_layers = layers
    return model


def trained(model: Any, data: Data, steps: int, lr: float, seed: int, distiller: Distiller, change: Any) -> None:
    optimizer = adamw(model.parameters(), lr)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)
    model.train()
    done = 0

    def backward(batch: Batch) -> float:
        nonlocal done
        loss = descended(distiller(change(batch), done / steps))
        done += 1
        return loss

    fit(optimizer, schedule, data.batches(steps, seed), backward)


@torch.no_grad()
def measured(model: Any, batches: list[Batch]) -> dict[str, float]:
    """Accuracy, negative log-likelihood and expected calibration error (15 bins), all over the rows."""
    model.eval()
    logits = torch.cat([model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    sure, said = logits.softmax(1).max(1)
    right = (said == labels).float()
    bins = (sure * 15).long().clamp(max=14)
    gaps = [(right[bins == i].sum() - sure[bins == i].sum()).abs() for i in range(15)]
    return {
        "accuracy": right.mean().item(),
        "nll": cross_entropy(logits, labels).item(),
        "ece": float(sum(gaps)) / len(labels),
    }


@cache
def work_of(context: Context) -> Path:
    return Path(context.settings["work"] or tempfile.mkdtemp())


@cache
def taught(name: str, context: Context) -> tuple[str, dict[str, float]]:
    """The folder of the teacher's logits on the training rows, and what the teacher scores."""
    settings, data = context.settings, rows_of(name, context)
    folder = work_of(context) / f"{name}-teacher"
    if not (folder / "config.json").exists():
        model = model_of(context, seed=0)
        trained(
            model, data, settings["teacher_steps"], settings["teacher_lr"], 0, Distiller(model), lambda batch: batch
        )
        model.save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    logits = work_of(context) / f"{name}-logits"
    if not logits.exists():
        cache_teacher(model, data.batched(list(data.train)), logits)
    return f"cache:{logits}", measured(model, data.evaluation)


def changed(cell: Cell, data: Data, context: Context) -> Any:
    """What arm D does to the labels of a batch: a row keeps its fate over the epochs and methods of a seed."""
    draw = torch.Generator().manual_seed(cell["seed"])
    fates = torch.rand(len(data.train), generator=draw).tolist()
    fate_of = {tuple(row["input_ids"]): fate for row, fate in zip(data.train, fates, strict=True)}

    def change(batch: Batch) -> Batch:
        if cell["arm"] != "D":
            return batch
        lengths = batch["attention_mask"].sum(1).tolist()
        rows = [tuple(ids[:n].tolist()) for ids, n in zip(batch["input_ids"], lengths, strict=True)]
        hit = torch.tensor([fate_of[row] < context.settings["flipped"] for row in rows])
        return {**batch, "labels": torch.where(hit, 1 - batch["labels"], batch["labels"])}

    return change


def run(cell: Cell, context: Context) -> dict[str, Any]:
    settings, data = context.settings, rows_of(cell["task"], context)
    where, teachers = taught(cell["task"], context)
    if cell["arm"] == "C" and cell["method"] == "fine-tune":
        data = copy(data)
        data.train = data.train[: settings["labelled"]]
    method = dict(settings["methods"][cell["method"]])
    teacher, preset = method.pop("teacher", None), method.pop("preset", "")
    config = (
        getattr(KDConfig, preset)("out", use_cpu=True, **method) if preset else KDConfig("out", use_cpu=True, **method)
    )
    start = time.process_time()
    model = model_of(context, cell["seed"], settings["layers"], pretrained=cell["arm"] != "B")
    distiller = Distiller(model, where if teacher == "cache" else teacher, config)
    trained(model, data, cell["steps"], cell["lr"], cell["seed"], distiller, changed(cell, data, context))
    cpu = time.process_time() - start
    tunes = cell["seed"] == settings["tune_seed"]
    return {
        **measured(model, data.tuning if tunes else data.evaluation),
        "evaluated_on": "tuning rows" if tunes else "evaluation rows",
        "teacher": teachers,
        "cpu_s": round(cpu, 1),
    }
