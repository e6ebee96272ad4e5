"""Adapters of four tasks, and a few rows of a fifth: what each way of using the adapters scores, at equal steps.

Every arm trains the same new head, of the same start, on the same batches. Where nothing below the head is trained,
what the encoder says of a row is computed once and kept.
"""

import json
import os
import random
import tempfile
import time
from copy import copy, deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from benchmarks.study import Cell, Context
from benchmarks.tasks import Batch, Data, Task, evaluate, load, rows_of, train
from benchmarks.training import adamw, descended, fit
from peft_dynamic import ScaLearnConfig


def base_of(name: str, seed: int, context: Context) -> Any:
    """The frozen classifier, with a new head that is trained."""
    task = Task(**context.settings["tasks"][name])
    model, _ = load(task, seed, context.paths["models"], task.classes)
    return model.requires_grad_(False)


def with_head(model: Any) -> Any:
    """After PEFT has frozen all that is no adapter."""
    inner(model).classifier.requires_grad_(True)
    return model


def inner(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def made(name: str, folder: Path, context: Context) -> None:
    """Train a source and keep it without its head, and what it scores with its head."""
    settings, data = context.settings, rows_of(name, context)
    seed = settings["source_seed"]
    model = with_head(get_peft_model(base_of(name, seed, context), LoraConfig(**settings["lora"])))
    train(model, data, settings["source_steps"][name], settings["source_lr"], seed)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        model.save_pretrained(f"{part}/source")
        Path(part, "source", "scores.json").write_text(json.dumps(evaluate(model, data.evaluation)), encoding="utf-8")
        if not folder.exists():  # another process may have been faster
            os.replace(f"{part}/source", folder)


@cache
def sources(context: Context) -> dict[str, Path]:
    """Name -> folder; what is not there yet is made."""
    work = Path(context.settings["work"] or context.folder / "sources")
    work.mkdir(parents=True, exist_ok=True)
    for name in context.settings["sources"]:
        if not (work / name).exists():
            made(name, work / name, context)
    return {name: work / name for name in context.settings["sources"]}


def build(cell: Cell, context: Context) -> Any:
    settings, arm = context.settings, cell["arm"]
    folders = {name: str(folder) for name, folder in sources(context).items()}
    base = base_of(cell["task"], cell["seed"], context)
    if arm == "head":
        return with_head(base)
    if arm in settings["scalearn"]:
        model = get_peft_model(base, ScaLearnConfig(adapters=folders, **settings["scalearn"][arm]))
        return with_head(model.requires_grad_(False) if arm == "search" else model)
    if arm in settings["merges"]:
        first, *others = folders
        model = PeftModel.from_pretrained(base, folders[first], adapter_name=first)
        for name in others:
            model.load_adapter(folders[name], name)
        how = dict(settings["merges"][arm])
        model.add_weighted_adapter([*folders], [how.pop("weight")] * len(folders), "merged", **how)
        model.set_adapter("merged", inference_mode=True)
        return with_head(model)
    model = get_peft_model(base, LoraConfig(**settings["lora"]))
    if arm == "warm":
        set_peft_model_state_dict(model, load_file(Path(folders[cell["source"]], "adapter_model.safetensors")))
    return with_head(model)


class Remembering(torch.nn.Module):
    """A classifier of which the head alone is trained."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.known = model, {}

    def forward(self, **inputs: torch.Tensor) -> Any:
        lengths = inputs["attention_mask"].sum(1).tolist()
        rows = [tuple(ids[:n].tolist()) for ids, n in zip(inputs["input_ids"], lengths, strict=True)]
        if not all(row in self.known for row in rows):
            self.known.update(zip(rows, pooled(self.model, inputs), strict=True))
        return SimpleNamespace(logits=inner(self.model).classifier(torch.stack([self.known[row] for row in rows])))


@torch.no_grad()
def pooled(model: Any, inputs: Batch) -> torch.Tensor:
    """What the head reads, under the autocast of `logits_and_labels`."""
    with torch.autocast("cpu", torch.bfloat16):
        found: torch.Tensor = inner(model).bert(**inputs)[1]
    return found


def halved_loss(states: torch.Tensor, labels: torch.Tensor, head: Any, lr: float, steps: int) -> float:
    """Of each half of the rows, by a head that was trained on the other one."""
    loss = 0.0
    for own, other in ((0, 1), (1, 0)):
        trained = deepcopy(head)
        batches = [(states[own::2], labels[own::2])] * steps
        fit(
            adamw(trained.parameters(), lr),
            None,
            batches,
            lambda batch, trained=trained: descended(cross_entropy(trained(batch[0]), batch[1])),
        )
        with torch.no_grad():
            loss += cross_entropy(trained(states[other::2]), labels[other::2]).item() / 2
    return loss


def search(model: Any, data: Data, cell: Cell, settings: dict[str, Any]) -> list[float]:
    """Leave the model with the weights that a search without gradients has found, one a source, and return them.

    As in LoRAHub the loss has a penalty of the weights. A new head fits a few rows at any weights, so here it is the
    loss of rows that the head was not trained on.
    """
    omega = next(value for name, value in model.named_parameters() if ".lora_scales." in name)
    batches = data.batched(list(data.train[: settings["search_rows"]]))
    labels = torch.cat([batch["labels"] for batch in batches])
    model.eval()

    def cost(weights: list[float]) -> float:
        with torch.no_grad():
            omega.copy_(torch.tensor(weights)[:, None])
        states = [pooled(model, {key: value for key, value in b.items() if key != "labels"}) for b in batches]
        loss = halved_loss(
            torch.cat(states).float(), labels, inner(model).classifier, cell["lr"], settings["head_steps"]
        )
        return loss + settings["penalty"] * sum(map(abs, weights)) / len(weights)

    rng = random.Random(cell["seed"])
    best = [1 / len(omega)] * len(omega)
    least, size = cost(best), 0.5
    for _ in range(settings["candidates"] - 1):
        tried = [weight + rng.gauss(0, size) for weight in best]
        found = cost(tried)
        size *= 1.5 if found < least else 0.9  # steady if a fifth of the tries is better
        if found < least:
            best, least = tried, found
    cost(best)
    return best


def few(data: Data, rows: int | str, seed: int) -> Data:
    """So many of the training rows, other ones by seed and the same for all arms."""
    data = copy(data)
    if rows != "all":
        data.train = random.Random(seed).sample(data.train, int(rows))
    return data


def run(cell: Cell, context: Context) -> dict[str, Any]:
    settings, data = context.settings, rows_of(cell["task"], context)
    rows = data.tuning if cell["seed"] == settings["tune_seed"] else data.evaluation
    data = few(data, cell["rows"], cell["seed"])
    scores = {
        name: json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        for name, folder in sources(context).items()
    }
    start = time.process_time()
    model = build(cell, context)
    named = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    trained, head = (sum(n for name, n in named if ("classifier" in name) == of_head) for of_head in (False, True))
    found: dict[str, Any] = {}
    if cell["arm"] == "search":
        found["weights"] = search(model, data, cell, settings)
        trained = len(found["weights"])
    still = trained == 0 or cell["arm"] == "search"
    model = Remembering(model) if still else model
    step_ms = train(model, data, cell["steps"], cell["lr"], cell["seed"])
    labels = torch.cat([batch["labels"] for batch in rows])
    return {
        **evaluate(model, rows),
        **found,
        "most": labels.bincount().max().item() / len(labels),
        "parameters": {"without_head": trained, "head": head},
        "step_ms": round(step_ms, 1),
        "cpu_s": round(time.process_time() - start, 1),
        "sources": scores,
    }
