"""Citation training of SmolLM2 (decoder) and a Flan-T5-small (FiD): each answers before and after, with three seeds.

    PYTHONPATH=. python benchmarks/citation_quality/run.py --data DATA --models MODELS

One run is `--only decoder --seed 0`; a run that answers.jsonl has already is skipped. `score.py` makes the figures.
"""

import argparse
import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tasks import Row, rows
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from peft_dynamic.trainers.citation.collators import CitationDataCollator, FiDDataCollator
from peft_dynamic.trainers.citation.fid import FiDForConditionalGeneration

HERE = Path(__file__).parent
EPOCHS = {"decoder": 1, "fid": 2}
ROWS = {"alce": 16, "expertqa": 4, "nq": 44}  # of each kind, drawn anew for each seed
BATCH, LR, NEW_TOKENS = 4, 1e-3, 72


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


def train(kind: str, model: Any, collator: Any, train_rows: list[Row], seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    chosen = [
        row
        for name, count in ROWS.items()
        for row in rng.sample([row for row in train_rows if row["kind"] == name], count)
    ]
    order = [row for _ in range(EPOCHS[kind]) for row in rng.sample(chosen, len(chosen))]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    steps = len(order) // BATCH
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)
    start, losses = time.process_time(), []
    model.train()
    for step in range(steps):
        batches = [collator([row]) for row in order[step * BATCH : (step + 1) * BATCH]]  # no padding on two cores
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = loss_of(model, batch, kind) / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(total, 4))
        print(f"{kind} seed {seed} step {step + 1}/{steps} loss {total:.3f}", flush=True)
    taken = time.process_time() - start
    return {"rows": steps * BATCH, "cpu_seconds_per_row": taken / (steps * BATCH), "losses": losses}


@torch.no_grad()
def answers(kind: str, model: Any, tokenizer: Any, collator: Any, questions: list[Row]) -> tuple[list[str], float]:
    """Greedy answers, four questions at a time, and the CPU seconds per question."""
    model.eval()
    start, out = time.process_time(), []
    for i in range(0, len(questions), 4):
        batch = collator([{k: row[k] for k in ("question", "passages")} for row in questions[i : i + 4]])
        given = 0 if kind == "fid" else batch["input_ids"].shape[1]
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "decoder"):
            made = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        out += [text.strip() for text in tokenizer.batch_decode(made[:, given:], skip_special_tokens=True)]
        print(f"{len(out)} of {len(questions)} answered: {out[-1][:150]!r}", flush=True)
    return out, (time.process_time() - start) / len(questions)


def run(kind: str, seed: int | None, data: Path, models: Path) -> dict[str, Any]:
    train_rows, questions, _ = rows(data)
    model, tokenizer, collator = load(kind, models, seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found: dict[str, Any] = {"model": kind, "seed": seed}
    if seed is not None:
        found |= {"train": train(kind, model, collator, train_rows, seed)}
        found |= {"train_mib_over_loaded": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before}
    texts, seconds = answers(kind, model, tokenizer, collator, questions)
    said = [{"id": row["id"], "output": text} for row, text in zip(questions, texts, strict=True)]
    return {**found, "answer_cpu_seconds_per_row": seconds, "answers": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=HERE / "answers.jsonl")
    parser.add_argument("--only", choices=EPOCHS)
    parser.add_argument("--seed", help="0, 1, 2 or base")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = [json.loads(line) for line in arguments.output.open()] if arguments.output.exists() else []
    done = {(one["model"], one["seed"]) for one in known}
    for seed in (None, 0, 1, 2):
        for kind in EPOCHS:
            wanted = arguments.only in (None, kind) and arguments.seed in (None, "base" if seed is None else str(seed))
            if not wanted or (kind, seed) in done:
                continue
            found = run(kind, seed, arguments.data, arguments.models)
            with arguments.output.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
