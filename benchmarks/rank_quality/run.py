"""Quality by rank: one DyLoRA run against a LoRA run per rank, and against LoRA of the largest rank cut down.

    python benchmarks/rank_quality/run.py --data DATA --models MODELS

DATA holds <task>/train.jsonl and <task>/validation.jsonl of sst2, mrpc, rte and e2e_nlg; MODELS holds the folders
minilm (sentence-transformers/all-MiniLM-L6-v2) and smollm2 (HuggingFaceTB/SmolLM2-135M-Instruct). Each run is one line
of runs.jsonl, written when it ends; runs that are there are skipped, so a stopped study goes on where it was.
report.py makes results.json and the plots from that file.
"""

import argparse
import importlib.metadata
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
    set_seed,
)

RUNS = Path(__file__).with_name("runs.jsonl")
RANKS = [1, 2, 4, 8, 16, 32]
SEEDS = [11, 12, 13]
TUNE_SEED = 5  # learning rates and alphas are chosen on it; it is not reported


@dataclass(frozen=True)
class Task:
    """Data and training length, the same for every method."""

    model: str
    targets: tuple[str, ...]
    max_length: int
    steps: int
    batch_size: int
    extra_eval: int  # training rows that are kept out of training and evaluated on as well
    eval_rows: int | None = None  # the first so many rows of the validation file; None for all


@dataclass(frozen=True)
class Method:
    """An adapter configuration; its learning rates are in REPORTED."""

    dylora: dict[str, Any] | None = None  # arguments of DyLoRAConfig, or None for LoRA of one rank
    scale: float | None = None  # lora_alpha = scale * r instead of 16


TASKS = {
    "sst2": Task("minilm", ("query", "value"), 64, 200, 32, 400),
    "mrpc": Task("minilm", ("query", "value"), 80, 200, 16, 200),
    "rte": Task("minilm", ("query", "value"), 96, 40, 16, 200),
    "e2e_nlg": Task("smollm2", ("q_proj", "v_proj"), 128, 30, 8, 0, 48),
}
METHODS = {
    "lora": Method(),
    "lora-2r": Method(scale=2),
    "lora-r/2": Method(scale=0.5),
    "dylora": Method({}),
    "dylora-paper": Method({"truncation": "prefix", "scaling": "alpha/b", "rank_sampling": "uniform"}),
}
# What is reported, with its learning rate; chosen with --tune, for the LoRA runs with their alpha (see LOG.md).
REPORTED = {
    "sst2": {"lora-r/2": 4e-3, "dylora": 4e-3, "dylora-paper": 4e-3},
    "mrpc": {"lora": 2e-3, "dylora": 2e-3, "dylora-paper": 2e-3},
    "rte": {"lora": 2e-3, "dylora": 2e-3, "dylora-paper": 2e-3},
    "e2e_nlg": {"lora": 8e-3, "dylora": 8e-3, "dylora-paper": 8e-3},
}

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]


def read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def encode(row: Row, tokenizer: Any, max_length: int) -> Row:
    """A classified sentence or pair, or (with a meaning representation) a prompt and its completion."""
    if "mr" in row:
        prompt = tokenizer(row["mr"] + "\n")["input_ids"]
        answer = tokenizer((row["ref"] if "ref" in row else row["refs"][0]) + tokenizer.eos_token)["input_ids"]
        return {"input_ids": (prompt + answer)[:max_length], "answer": len(answer)}
    texts = [row["sentence"]] if "sentence" in row else [row["sentence1"], row["sentence2"]]
    return {**tokenizer(*texts, truncation=True, max_length=max_length), "label": row["label"]}


def collate(rows: list[Row], pad: int) -> Batch:
    """A padded batch; for completions padded on the left, so that they end together."""
    width = max(len(row["input_ids"]) for row in rows)
    if "answer" in rows[0]:
        padding = [width - len(row["input_ids"]) for row in rows]
        ids = torch.tensor([[pad] * n + row["input_ids"] for n, row in zip(padding, rows, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
        # Only the last positions have labels, so that is all the logits that the model needs to make.
        longest = max(row["answer"] for row in rows)
        labels = ids[:, -longest:].clone()
        for row, label in zip(rows, labels, strict=True):
            label[: longest - row["answer"]] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([value + [fill] * (width - len(value)) for value in values])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad),
        "token_type_ids": padded([row["token_type_ids"] for row in rows], 0),
        "attention_mask": padded([row["attention_mask"] for row in rows], 0),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


class Data:
    """Tokenised rows of a task: training batches by seed, and the evaluation batches."""

    def __init__(self, name: str, data: Path, models: Path) -> None:
        task = TASKS[name]
        tokenizer = AutoTokenizer.from_pretrained(models / task.model)
        self.pad = tokenizer.pad_token_id
        train = [encode(row, tokenizer, task.max_length) for row in read(data / name / "train.jsonl")]
        rows = [
            encode(row, tokenizer, task.max_length) for row in read(data / name / "validation.jsonl")[: task.eval_rows]
        ]
        random.Random(123).shuffle(train)
        rows += train[: task.extra_eval]
        self.train, self.batch_size = train[task.extra_eval :], task.batch_size
        rows.sort(key=lambda row: len(row["input_ids"]))
        size = 64 if task.model == "minilm" else 12
        self.evaluation = [collate(rows[i : i + size], self.pad) for i in range(0, len(rows), size)]

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """Shuffled; of each eight batches' worth of rows, those of like length go together."""
        rng, size, left = random.Random(seed), self.batch_size, steps
        while left:
            order = rng.sample(self.train, len(self.train))
            epoch = []
            for i in range(0, len(order), 8 * size):
                rows = sorted(order[i : i + 8 * size], key=lambda row: len(row["input_ids"]))
                epoch += [rows[k : k + size] for k in range(0, len(rows) - size + 1, size)]
            rng.shuffle(epoch)
            for rows in epoch[:left]:
                yield collate(rows, self.pad)
            left -= min(left, len(epoch))


def logits_and_labels(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    with torch.autocast("cpu", torch.bfloat16):
        if labels.dim() == 1:
            return model(**inputs).logits.float(), labels
        logits = model(**inputs, use_cache=False, logits_to_keep=labels.shape[1] + 1).logits
    return logits[:, :-1][labels != -100].float(), labels[labels != -100]


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: Data) -> dict[str, float]:
    model.eval()
    loss = hits = count = 0
    for batch in data.evaluation:
        logits, labels = logits_and_labels(model, batch)
        loss += cross_entropy(logits, labels, reduction="sum").item()
        hits += (logits.argmax(-1) == labels).sum().item()
        count += len(labels)
    return {"loss": loss / count, "accuracy": hits / count}


def build(task: Task, method: Method, rank: int, seed: int, models: Path) -> torch.nn.Module:
    """The model with its adapter, in float32; everything runs under autocast to bfloat16."""
    set_seed(seed)  # of the adapter and of the new head
    classifies = task.model == "minilm"
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    extra = {"num_labels": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if classifies else {}
    base = auto.from_pretrained(models / task.model, dtype=torch.float32, attn_implementation="eager", **extra)
    common: dict[str, Any] = {
        "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM",
        "target_modules": list(task.targets),
        "lora_alpha": 16 if method.scale is None else method.scale * rank,
    }
    if method.dylora is None:
        config = LoraConfig(r=rank, **common)
    else:
        from peft_dynamic import DyLoRAConfig

        config = DyLoRAConfig(r=rank, ranks=RANKS, rank_seed=seed, **method.dylora, **common)
    return get_peft_model(base, config)


@contextmanager
def cut(model: torch.nn.Module, rank: int, how: str) -> Iterator[None]:
    """LoRA with fewer components: the first ones ("index"), or the leading ones of the singular values ("svd")."""
    pairs = [
        (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
    ]
    whole = [(a.data, b.data) for a, b in pairs]
    for a, b in pairs:
        if how == "svd":
            q_b, r_b = torch.linalg.qr(b.data)
            q_a, r_a = torch.linalg.qr(a.data.T)
            u, s, vh = torch.linalg.svd(r_b @ r_a.T)
            b.data, a.data = q_b @ u * s, vh @ q_a.T
        a.data, b.data = a.data[:rank].contiguous(), b.data[:, :rank].contiguous()
    yield
    for (a, b), (whole_a, whole_b) in zip(pairs, whole, strict=True):
        a.data, b.data = whole_a, whole_b


def train(model: torch.nn.Module, data: Data, steps: int, lr: float, seed: int) -> float:
    """Milliseconds per step, the median."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)
    model.train()
    times = []
    for batch in data.batches(steps, seed):
        start = time.perf_counter()
        cross_entropy(*logits_and_labels(model, batch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e3


def curves(model: torch.nn.Module, method: Method, rank: int, data: Data, all_ranks: bool) -> dict[str, Any]:
    """Evaluation by way of getting a rank ("trained", "index", "svd") and by rank."""
    if method.dylora is not None:
        by_rank = {}
        for b in RANKS:
            with model.at_rank(b):
                by_rank[b] = evaluate(model, data)
        return {"trained": by_rank}
    result = {"trained": {rank: evaluate(model, data)}}
    if all_ranks and rank == RANKS[-1]:
        for how in ("index", "svd"):
            result[how] = {}
            for b in RANKS[:-1]:
                with cut(model, b, how):
                    result[how][b] = evaluate(model, data)
            result[how][rank] = result["trained"][rank]
    return result


def run(name: str, method_name: str, rank: int, seed: int, lr: float, data: Data, models: Path) -> None:
    """Train, evaluate and write a line, unless there is one."""
    task, method = TASKS[name], METHODS[method_name]
    key = {"task": name, "method": method_name, "rank": rank, "seed": seed, "lr": lr, "steps": task.steps}
    if RUNS.exists() and any(key.items() <= row.items() for row in read(RUNS)):
        return
    start = time.perf_counter()
    model = build(task, method, rank, seed, models)
    step_ms = train(model, data, task.steps, lr, seed)
    trained = time.perf_counter()
    config = model.peft_config["default"]
    row = {
        **key,
        "curves": curves(model, method, rank, data, all_ranks=seed != TUNE_SEED),
        "step_ms": round(step_ms, 1),
        "train_seconds": round(trained - start, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "setting": asdict(task),
        "adapter": {
            field: getattr(config, field, None) for field in ("lora_alpha", "truncation", "scaling", "rank_sampling")
        },
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with RUNS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = {
        how: [f"{b}: {point['loss']:.4f} {point['accuracy']:.3f}" for b, point in by_rank.items()]
        for how, by_rank in row["curves"].items()
    }
    print(json.dumps(key), shown, f"{step_ms:.0f} ms a step, {row['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: those of REPORTED")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--tune", nargs="+", type=float, metavar="LR", help="try these on the spare seed instead")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS, help="of the LoRA runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = {name: Data(name, arguments.data, arguments.models) for name in arguments.tasks}
    for seed in [TUNE_SEED] if arguments.tune else arguments.seeds:
        for name, data in loaded.items():
            for method in arguments.methods or REPORTED[name]:
                for rank in arguments.ranks if METHODS[method].dylora is None else RANKS[-1:]:
                    for lr in arguments.tune or [REPORTED[name][method]]:
                        run(name, method, rank, seed, lr, data, arguments.models)


if __name__ == "__main__":
    main()
