"""SoFT by depth, beside what else one could do: SFT, SFT with a head per exit, and fine-tuned models cut to a depth.

All parameters are trained.
"""

import random
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from benchmarks.study import Cell, Context
from benchmarks.tasks import read
from benchmarks.training import adamw, descended, fit
from peft_dynamic.functional.exit_loss import exit_losses
from peft_dynamic.hosts.decoder import Decoder, find_decoder, layer_state
from peft_dynamic.trainers import SoFTConfig, SoFTTrainer

Examples = list[dict[str, Any]]


@lru_cache(maxsize=2)
def examples(context: Context, tune: bool) -> tuple[Examples, Examples]:
    """Training rows, and rows to evaluate: some of the validation file, or others kept out of training."""
    data, tuned = context.paths["data"], context.settings["tuned"]
    rows = read(data / "e2e_nlg/train.jsonl")
    random.Random(123).shuffle(rows)
    train = [{"prompt": row["mr"] + "\n", "completion": row["ref"]} for row in rows]
    if tune:
        return train[tuned:][:1000], [row | {"refs": [row["completion"]]} for row in train[:tuned]]
    held = random.Random(5).sample(read(data / "e2e_nlg/validation.jsonl"), context.settings["evaluated"])
    return train[tuned:][:1000], [
        {"prompt": r["mr"] + "\n", "completion": r["refs"][0], "refs": r["refs"]} for r in held
    ]


def settings(cell: Cell, context: Context, folder: str, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": cell["steps"],
        "per_device_train_batch_size": context.settings["batch"],
        "learning_rate": cell["lr"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(0.1 * cell["steps"]),
        "max_length": context.settings["length"],
        "seed": cell["seed"],
        "use_cpu": True,
        "bf16": True,  # autocast; the weights are float32
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": cell["steps"],
        "disable_tqdm": True,
        **more,
    }


def cut_to(model: Any, depth: int) -> Any:
    model.model.layers = nn.ModuleList(model.model.layers[:depth])
    model.config.num_hidden_layers = depth
    return model


def batches(rows: Examples, tokenizer: Any, length: int, size: int = 12) -> list[dict[str, torch.Tensor]]:
    """Padded batches of prompts with their completions, rows of like length together."""
    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        encoded.append(((prompt + answer)[:length], ([-100] * len(prompt) + answer)[:length]))
    encoded.sort(key=lambda pair: len(pair[0]))
    found = []
    for start in range(0, len(encoded), size):
        part = encoded[start : start + size]
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in part])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in part])
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@torch.no_grad()
def states(decoder: Decoder, batch: dict[str, torch.Tensor], exits: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, N, D) states after the final norm at the labelled positions of a batch, and the (N,) labels."""
    seen: dict[int, torch.Tensor] = {}
    handles = [
        decoder.layers[k - 1].register_forward_hook(lambda _, args, out, k=k: seen.update({k: layer_state(out)}))
        for k in exits
    ]
    with torch.autocast("cpu", torch.bfloat16):
        decoder.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        labels = batch["labels"][:, 1:]
        keep = labels != -100
        hidden = torch.stack([decoder.finish(seen[k][:, :-1][keep]).float() for k in exits])
    for handle in handles:
        handle.remove()
    return hidden, labels[keep]


@torch.no_grad()
def losses(model: Any, batched: list[Any], exits: list[int], heads: Any = None) -> dict[str, float]:
    """Mean loss by exit, with the model's head, or with one of its own for those exits that have one."""
    decoder = find_decoder(model.eval())
    sums, count = dict.fromkeys(exits, 0.0), 0
    for batch in batched:
        hidden, labels = states(decoder, batch, exits)
        count += len(labels)
        for k, state in zip(exits, hidden, strict=True):
            head = decoder.head.weight if heads is None or k not in heads else heads[k]
            with torch.autocast("cpu", torch.bfloat16):
                sums[k] += exit_losses(state[None], labels, head).nll.item()
    return {str(k): total / count for k, total in sums.items()}


def rouge_l(text: str, references: list[str]) -> float:
    """F1 of the longest common subsequence of words, with the nearest reference."""

    def score(words: list[str], other: list[str]) -> float:
        row = [0] * (len(other) + 1)
        for word in words:
            last = 0
            for j, second in enumerate(other, 1):
                last, row[j] = row[j], last + 1 if word == second else max(row[j], row[j - 1])
        return 2 * row[-1] / max(1, len(words) + len(other))

    return max(score(text.lower().split(), reference.lower().split()) for reference in references)


@torch.no_grad()
def written(model: Any, rows: Examples, tokenizer: Any, new_tokens: int, depth: int, head: Any = None) -> float:
    """Mean ROUGE-L of what the model, left after `depth` layers, writes greedily."""
    layers, own = model.model.layers, model.lm_head.weight
    model.eval()
    try:
        cut_to(model, depth)
        if head is not None:
            model.lm_head.weight = nn.Parameter(head, requires_grad=False)
        tokenizer.padding_side = "left"
        inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
        with torch.autocast("cpu", torch.bfloat16):
            ids = model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
    finally:
        model.model.layers, model.lm_head.weight = layers, own
        model.config.num_hidden_layers = len(layers)
        tokenizer.padding_side = "right"
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(rouge_l(text, row["refs"]) for text, row in zip(texts, rows, strict=True)) / len(rows)


def train_heads(
    model: Any, rows: Examples, tokenizer: Any, exits: list[int], cell: Cell, context: Context
) -> dict[int, torch.Tensor]:
    """A head per exit, started as the model's, trained on its frozen states (the paper's SFT+ICT).

    As many steps of as many rows as the model had, of the states that are computed once for all exits.
    """
    seed, size = cell["seed"], context.settings["batch"]
    torch.manual_seed(seed)
    decoder = find_decoder(model.eval())
    chosen = random.Random(seed).sample(rows, cell["steps"] * size)
    cached = [states(decoder, b, exits) for b in batches(chosen, tokenizer, context.settings["length"], size)]
    random.Random(seed).shuffle(cached)

    def backward(head: torch.Tensor, index: int, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        hidden, labels = batch
        with torch.autocast("cpu", torch.bfloat16):
            loss = exit_losses(hidden[index : index + 1], labels, head).loss / len(labels)
        return descended(loss)

    heads = {}
    for index, k in enumerate(exits):
        head = nn.Parameter(decoder.head.weight.detach().clone())
        optimizer = adamw([head], cell["lr"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(cached))
        fit(optimizer, schedule, cached, partial(backward, head, index), clip=None)
        heads[k] = head.detach()
    return heads


@lru_cache(maxsize=1)  # the heads of a seed come after its SFT
def trained(kind: str, seed: int, lr: float, steps: int, context: Context) -> tuple[Any, Any, float]:
    """The model, its tokenizer, and the seconds that its training took."""
    transformers_logging.set_verbosity_error()
    cell, folder = {"seed": seed, "lr": lr, "steps": steps}, context.paths["models"] / "smollm2"
    rows, _ = examples(context, seed == context.settings["tune_seed"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if kind == "cut":
        cut_to(model, context.settings["cut"])
    dataset, last = Dataset.from_list(rows), context.settings["last"].get(kind)
    with tempfile.TemporaryDirectory() as out:
        common = {"train_dataset": dataset, "processing_class": tokenizer}
        if last is not None:
            exits = context.settings["exits"]
            others = len(exits) - 1
            weights = [1.0] * others + [others * last / (1 - last)]
            config = SoFTConfig(exits=exits, exit_weights=weights, **settings(cell, context, out))
            trainer: Any = SoFTTrainer(model, config, **common)
        else:
            trainer = SFTTrainer(model, SFTConfig(**settings(cell, context, out)), **common)
        result = trainer.train()
    if last is not None and context.settings["save"]:
        model.save_pretrained(Path(context.settings["save"]))
        tokenizer.save_pretrained(Path(context.settings["save"]))
    return model, tokenizer, result.metrics["train_runtime"]


def run(cell: Cell, context: Context) -> dict[str, Any]:
    kind, tune, options = cell["kind"], cell["seed"] == context.settings["tune_seed"], context.settings
    rows, held = examples(context, tune)
    base, lr = ("sft", options["sft_lr"]) if kind == "heads" else (kind, cell["lr"])
    model, tokenizer, seconds = trained(base, cell["seed"], lr, cell["steps"], context)
    heads: dict[int, torch.Tensor] = {}
    exits, texts = options["exits"], options["generated"]
    if kind == "cut":
        exits, texts = [options["cut"]], [options["cut"]]
    if kind == "heads":
        exits = options["tuned_heads"] if tune else options["heads"]
        texts, heads = exits, train_heads(model, rows, tokenizer, exits, cell, context)
    found = {
        "tune": tune,
        "train_seconds": round(seconds),
        "loss": losses(model, batches(held, tokenizer, options["length"]), exits, heads),
    }
    if not tune:
        some, new = held[: options["written"]], options["new_tokens"]
        found["rouge_l"] = {str(k): written(model, some, tokenizer, new, k, heads.get(k)) for k in texts}
    return found
