"""SoFT by depth, beside what else one could do: SFT, SFT with a head per exit, and fine-tuned models cut to a depth.

    PYTHONPATH=. python benchmarks/soft_quality/run.py --data DATA --models MODELS [--only soft] [--seed 0]

DATA holds e2e_nlg/train.jsonl and e2e_nlg/validation.jsonl, MODELS the folder smollm2 (SmolLM2-135M-Instruct, 30
layers). All parameters are trained. "soft" has equal weights, as in the paper; "soft-half" and "soft-most" give the
full depth half and nine tenths of the weight. Each run is one line of runs.jsonl, written when it ends; what is there
is skipped. report.py makes results.json, the table and the plot from that file. `--save DIR` keeps a SoFT model.
"""

import argparse
import importlib.metadata
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from benchmarks.tasks import read
from peft_dynamic.functional.exit_loss import exit_losses
from peft_dynamic.trainers import SoFTConfig, SoFTTrainer
from peft_dynamic.trainers.soft.structure import Decoder, find_decoder, layer_state

RUNS = Path(__file__).with_name("runs.jsonl")
EXITS = [9, 12, 15, 18, 21, 24, 27, 30]  # SoFTConfig's own for 30 layers
CUT = [15]  # depths of the models that are cut first and then fine-tuned
GENERATED = [9, 15, 21, 27, 30]
HEADS = [9, 15, 21, 27]  # exits that get a head of their own
SEEDS = [0, 1, 2]
TUNE_SEED = 7
STEPS, BATCH, LENGTH = 60, 4, 128
LAST = {"soft": 1 / 8, "soft-half": 0.5, "soft-most": 0.9}  # the share of the loss that the full depth has
EVALUATED, TUNED, WRITTEN = 64, 32, 16  # rows: evaluated, for the choice of learning rates, continued by generation
LR = {"sft": 3e-4, "soft": 3e-4, "soft-half": 3e-4, "soft-most": 3e-4, "cut": 3e-4, "heads": 1e-3}


def examples(data: Path, tune: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows, and rows to evaluate: the first of the validation file, or others kept out of training."""
    rows = read(data / "e2e_nlg/train.jsonl")
    random.Random(123).shuffle(rows)
    train = [{"prompt": row["mr"] + "\n", "completion": row["ref"]} for row in rows]
    if tune:
        return train[TUNED:][:1000], [row | {"refs": [row["completion"]]} for row in train[:TUNED]]
    held = random.Random(5).sample(read(data / "e2e_nlg/validation.jsonl"), EVALUATED)
    return train[TUNED:][:1000], [
        {"prompt": r["mr"] + "\n", "completion": r["refs"][0], "refs": r["refs"]} for r in held
    ]


def settings(lr: float, seed: int, folder: str, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(0.1 * STEPS),
        "max_length": LENGTH,
        "seed": seed,
        "use_cpu": True,
        "bf16": True,  # autocast; the weights are float32
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": STEPS,
        "disable_tqdm": True,
        **more,
    }


def cut_to(model: Any, depth: int) -> Any:
    model.model.layers = nn.ModuleList(model.model.layers[:depth])
    model.config.num_hidden_layers = depth
    return model


def batches(rows: list[dict[str, Any]], tokenizer: Any, size: int = 12) -> list[dict[str, torch.Tensor]]:
    """Padded batches of prompts with their completions, rows of like length together."""
    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        encoded.append(((prompt + answer)[:LENGTH], ([-100] * len(prompt) + answer)[:LENGTH]))
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
def losses(model: Any, rows: list[dict[str, Any]], tokenizer: Any, exits: list[int], heads: Any = None) -> dict:
    """Mean loss by exit, with the model's head, or with one of its own for those exits that have one."""
    decoder = find_decoder(model.eval())
    sums, count = dict.fromkeys(exits, 0.0), 0
    for batch in batches(rows, tokenizer):
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
def written(model: Any, rows: list[dict[str, Any]], tokenizer: Any, depth: int, head: Any = None) -> float:
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
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    finally:
        model.model.layers, model.lm_head.weight = layers, own
        model.config.num_hidden_layers = len(layers)
        tokenizer.padding_side = "right"
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(rouge_l(text, row["refs"]) for text, row in zip(texts, rows, strict=True)) / len(rows)


def train_heads(
    model: Any, rows: list[dict[str, Any]], tokenizer: Any, lr: float, seed: int, exits: list[int]
) -> dict[int, torch.Tensor]:
    """A head per exit, started as the model's, trained on its frozen states (the paper's SFT+ICT).

    As many steps of as many rows as the model had, of the states that are computed once for all exits.
    """
    torch.manual_seed(seed)
    decoder = find_decoder(model.eval())
    chosen = random.Random(seed).sample(rows, STEPS * BATCH)
    cached = [states(decoder, batch, exits) for batch in batches(chosen, tokenizer, BATCH)]
    random.Random(seed).shuffle(cached)
    heads = {}
    for index, k in enumerate(exits):
        head = decoder.head.weight.detach().clone().requires_grad_()
        optimizer = torch.optim.AdamW([head], lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(cached))
        for hidden, labels in cached:
            with torch.autocast("cpu", torch.bfloat16):
                loss = exit_losses(hidden[index : index + 1], labels, head).loss / len(labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        heads[k] = head.detach()
    return heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--only", choices=["sft", *LAST, "cut"])
    parser.add_argument("--seed", type=int)
    parser.add_argument("--lr", type=float, help="with --tune: the learning rate to try")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    done = {row["name"] for row in map(json.loads, RUNS.read_text().splitlines())} if RUNS.exists() else set()
    seeds = [TUNE_SEED] if options.tune else SEEDS if options.seed is None else [options.seed]
    jobs = [(kind, 0) for kind in (*LAST, "sft")] + [("cut", k) for k in CUT]
    for seed in seeds:
        for kind, depth in jobs:
            lr = options.lr if options.lr is not None else LR[kind]
            name = f"{kind}{depth or ''}/{'tune' if options.tune else seed}/{lr:g}/{STEPS}"
            if name not in done and options.only in (None, kind):
                run(name, kind, depth, seed, lr, options)


def run(name: str, kind: str, depth: int, seed: int, lr: float, options: argparse.Namespace) -> None:
    rows, held = examples(options.data, options.tune)
    tokenizer = AutoTokenizer.from_pretrained(options.models / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        options.models / "smollm2", dtype=torch.float32, attn_implementation="eager"
    )
    if kind == "cut":
        cut_to(model, depth)
    dataset = Dataset.from_list(rows)
    with tempfile.TemporaryDirectory() as folder:
        common = {"train_dataset": dataset, "processing_class": tokenizer}
        if kind in LAST:
            others = len(EXITS) - 1
            weights = [1.0] * others + [others * LAST[kind] / (1 - LAST[kind])]
            trainer: Any = SoFTTrainer(model, SoFTConfig(exit_weights=weights, **settings(lr, seed, folder)), **common)
        else:
            trainer = SFTTrainer(model, SFTConfig(**settings(lr, seed, folder)), **common)
        result = trainer.train()
    del trainer
    exits = [depth] if kind == "cut" else EXITS

    def record(**fields: Any) -> dict[str, Any]:
        return {
            "name": name,
            "kind": kind,
            "seed": seed,
            "lr": lr,
            "steps": STEPS,
            "tune": options.tune,
            "train_seconds": round(result.metrics["train_runtime"]),
            "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "trl")},
            **fields,
        }

    keep(record(loss=losses(model, held, tokenizer, exits)) | rouge_of(model, held, tokenizer, exits, options.tune))
    if options.save and kind in LAST:
        model.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)
    if kind != "sft":
        return
    for rate in (3e-4, 1e-3) if options.tune else (LR["heads"],):
        places = [15] if options.tune else HEADS
        heads = train_heads(model, rows, tokenizer, rate, seed, places)
        line = record(loss=losses(model, held, tokenizer, places, heads))
        if not options.tune:
            some = held[:WRITTEN]
            line["rouge_l"] = {str(k): written(model, some, tokenizer, k, heads[k]) for k in HEADS}
        named = f"heads/{'tune' if options.tune else seed}/{rate:g}/{STEPS}"
        keep(line | {"name": named, "kind": "heads", "lr": rate})


def rouge_of(model: Any, rows: list[dict[str, Any]], tokenizer: Any, exits: list[int], tune: bool) -> dict[str, Any]:
    if tune:
        return {}
    return {"rouge_l": {str(k): written(model, rows[:WRITTEN], tokenizer, k) for k in exits if k in GENERATED}}


def keep(line: dict[str, Any]) -> None:
    with RUNS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
