"""What the studies of quality share: a task's rows, their batches, one way to train and one to evaluate."""

import gzip
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from scipy.stats import pearsonr, spearmanr
from torch.nn.functional import cross_entropy, mse_loss
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
    set_seed,
)

from benchmarks.study import Context
from benchmarks.training import adamw, descended, fit

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]
# In their order in a pair
TEXTS = ("question", "sentence", "sentence1", "sentence2", "premise", "hypothesis", "passage")


@dataclass(frozen=True)
class Task:
    """Data and batches, the same for every method."""

    model: str
    targets: list[str]
    max_length: int
    batch_size: int
    extra_eval: int = 0  # training rows that are kept out of training and evaluated on as well
    eval_rows: int | None = None  # the first so many rows of the validation file; None for all
    metric: str = "accuracy"
    tune_rows: int = 0  # more rows that are kept out of training, to choose settings on
    classes: int = 2  # of a task whose rows have a class


def read(path: Path) -> list[Row]:
    """Of a file of JSON lines, or of the compressed one beside its place."""
    packed = path.with_name(path.name + ".gz")
    if packed.exists():
        with gzip.open(packed, "rt", encoding="utf-8") as lines:  # splitlines would part at U+2028, too
            return [json.loads(line) for line in lines]
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def completed(prompt: list[int], answer: list[int], max_length: int) -> Row:
    """Cut at the end; "answer" is how many of the last tokens are the answer's, 0 where the prompt fills the length."""
    tokens = (prompt + answer)[:max_length]
    return {"input_ids": tokens, "answer": max(len(tokens) - len(prompt), 0)}


def is_asked(row: Row) -> bool:
    """Whether anything of a row is in the loss."""
    return row.get("answer") != 0


def instruction(row: Row, tokenizer: Any) -> list[int]:
    """The tokens of an instruction and its input."""
    return tokenizer("\n".join(filter(None, (row["instruction"], row["input"]))) + "\n\n")["input_ids"]


def encode(row: Row, tokenizer: Any, max_length: int) -> Row:
    """A sentence or pair with its class or its similarity (0 to 5, here -1 to 1), or a prompt and its completion."""
    if "triples" in row:
        row = {**row, "mr": "; ".join(" | ".join(triple) for triple in row["triples"])}
    if "answer" in row and "question" in row and "instruction" not in row:
        row = {"mr": row["question"], "ref": row["answer"]}
    if "mr" in row:
        prompt = tokenizer(row["mr"] + "\n")["input_ids"]
        answer = tokenizer((row["ref"] if "ref" in row else row["refs"][0]) + tokenizer.eos_token)["input_ids"]
        return completed(prompt, answer, max_length)
    if "instruction" in row:
        answer = tokenizer(row["output"] + tokenizer.eos_token)["input_ids"]
        # Cut at the front: the options stand at the end.
        return completed(instruction(row, tokenizer)[-(max_length - len(answer)) :], answer, max_length)
    if "word" in row:
        row = {**row, "sentence1": f"{row['word']}: {row['sentence1']}"}
    texts = [row[key] for key in TEXTS if key in row]
    label = row["label"] / 2.5 - 1 if isinstance(row["label"], float) else row["label"]
    return {**tokenizer(*texts, truncation=True, max_length=max_length), "label": label}


def encode_choice(row: Row, tokenizer: Any, max_length: int) -> Row:
    """An instruction up to where its allowed completions part, and the one token by which each goes on.

    "the correct answer is answer1" and "... answer2" share all tokens but one, so the likelihoods of the completions
    differ by those of that token (but for that of the end, which is the same text for all).
    """
    options = re.search(r"Answer format: (\S+)\s*$", row["instruction"])
    if options is None or not row["output"].endswith(row["answer"]):
        raise ValueError(f"no options in {row['instruction']!r}")
    names = options[1].split("/")
    stem = row["output"].removesuffix(row["answer"])
    completions = [tokenizer(stem + name)["input_ids"] for name in names]
    lengths = {len(tokens) for tokens in completions}
    shared = min(lengths) - 1
    choices = [tokens[-1] for tokens in completions]
    if len(lengths) > 1 or len({*choices}) < len(names) or len({tuple(tokens[:-1]) for tokens in completions}) > 1:
        raise ValueError(f"more than one token decides between {names}")
    prompt = instruction(row, tokenizer)[-(max_length - shared) :]
    return {"input_ids": prompt + completions[0][:shared], "choices": choices, "label": names.index(row["answer"])}


def padded_left(rows: list[Row], pad: int) -> Batch:
    """So that the rows end together."""
    width = max(len(row["input_ids"]) for row in rows)
    padding = [width - len(row["input_ids"]) for row in rows]
    ids = torch.tensor([[pad] * n + row["input_ids"] for n, row in zip(padding, rows, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
    return {"input_ids": ids, "attention_mask": mask}


def collate(rows: list[Row], pad: int) -> Batch:
    """A padded batch."""
    if "answer" in rows[0]:
        batch = padded_left(rows, pad)
        # Only the last positions have labels, so that is all the logits that the model needs to make.
        longest = max(row["answer"] for row in rows)
        labels = batch["input_ids"][:, -longest:].clone()
        for row, label in zip(rows, labels, strict=True):
            label[: longest - row["answer"]] = -100
        return {**batch, "labels": labels}
    labels = torch.tensor([row["label"] for row in rows])
    if "choices" in rows[0]:
        most = max(len(row["choices"]) for row in rows)
        choices = torch.tensor([row["choices"] + [-1] * (most - len(row["choices"])) for row in rows])
        return {**padded_left(rows, pad), "choices": choices, "labels": labels}
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([value + [fill] * (width - len(value)) for value in values])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad),
        "token_type_ids": padded([row["token_type_ids"] for row in rows], 0),
        "attention_mask": padded([row["attention_mask"] for row in rows], 0),
        "labels": labels,
    }


class Data:
    """Tokenised rows of a task: training batches by seed, and the batches to evaluate on and to choose settings on.

    The validation rows of a file of several tasks are those that come first of each, as many of one as of another.
    """

    def __init__(self, name: str, task: Task, data: Path, models: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(models / task.model)
        self.pad, self.batch_size = tokenizer.pad_token_id, task.batch_size
        self.evaluation_size = 64 if task.model == "minilm" else 12
        raw = read(data / name / "train.jsonl")
        held, validation = task.extra_eval + task.tune_rows, read(data / name / "validation.jsonl")
        by_task: dict[str, list[Row]] = {}
        for row in validation:
            by_task.setdefault(row.get("task", ""), []).append(row)
        each = None if task.eval_rows is None else task.eval_rows // len(by_task)
        random.Random(123).shuffle(raw)
        self.train = [made for row in raw[held:] if is_asked(made := encode(row, tokenizer, task.max_length))]
        evaluated = [row for rows in by_task.values() for row in rows[:each]] + raw[: task.extra_eval]
        as_evaluated = encode_choice if "instruction" in raw[0] else encode
        self.evaluation, self.tuning = (
            self.batched([made for row in rows if is_asked(made := as_evaluated(row, tokenizer, task.max_length))])
            for rows in (evaluated, raw[task.extra_eval : held])
        )

    def batched(self, rows: list[Row]) -> list[Batch]:
        rows.sort(key=lambda row: len(row["input_ids"]))
        size = self.evaluation_size
        return [collate(rows[i : i + size], self.pad) for i in range(0, len(rows), size)]

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


@cache
def rows_of(name: str, context: Context) -> Data:
    """The rows of a task of a study, read once."""
    return Data(name, Task(**context.settings["tasks"][name]), context.paths["data"], context.paths["models"])


def labelled(batch: Batch) -> Batch:
    """With labels of the width that the model's own loss wants."""
    missing = batch["input_ids"].shape[1] - batch["labels"].shape[-1]
    if batch["labels"].dim() == 1 or not missing:
        return batch
    return {**batch, "labels": torch.nn.functional.pad(batch["labels"], (missing, 0), value=-100)}


def load(task: Task, seed: int, models: Path, num_labels: int = 2) -> tuple[torch.nn.Module, str]:
    """The model in float32, with a new head that is drawn from `seed`, and PEFT's task type."""
    set_seed(seed)  # of the adapter, which is drawn next, and of the new head
    classifies = task.model == "minilm"
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    head = {"num_labels": num_labels, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    extra = head if classifies else {}
    base = auto.from_pretrained(models / task.model, dtype=torch.float32, attn_implementation="eager", **extra)
    return base, "SEQ_CLS" if classifies else "CAUSAL_LM"


def logits_and_labels(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Under autocast to bfloat16: of classes, of similarities (one a row), of tokens or of the choices' tokens."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "choices")}
    labels = batch["labels"]
    with torch.autocast("cpu", torch.bfloat16):
        if "choices" in batch:
            logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            absent = batch["choices"] < 0
            return logits.gather(1, batch["choices"].clamp(min=0)).masked_fill(absent, -torch.inf), labels
        if labels.dim() == 1:
            logits = model(**inputs).logits.float()
            return logits.squeeze(-1) if labels.is_floating_point() else logits, labels
        logits = model(**inputs, use_cache=False, logits_to_keep=labels.shape[1] + 1).logits
    return logits[:, :-1][labels != -100].float(), labels[labels != -100]


def loss_of(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return (mse_loss if labels.is_floating_point() else cross_entropy)(logits, labels, reduction=reduction)


def train(
    model: torch.nn.Module, data: Data, steps: int, lr: float, seed: int, optimizer: torch.optim.Optimizer | None = None
) -> float:
    """Milliseconds per step, the median; without an optimizer it is AdamW at `lr`."""
    optimizer = optimizer or adamw(model.parameters(), lr)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)
    model.train()
    taken = fit(
        optimizer,
        schedule,
        data.batches(steps, seed),
        lambda batch: descended(loss_of(*logits_and_labels(model, batch))),
    )
    return sorted(step.seconds for step in taken)[len(taken) // 2] * 1e3


def score(metric: str, predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy, Matthews correlation of two classes, or the mean of Pearson's and Spearman's correlation.

    A correlation with a constant is 0.
    """
    if metric == "accuracy":
        return (predicted == labels).sum().item() / len(labels)
    if len(predicted.unique()) == 1:
        return 0.0
    pearson = float(pearsonr(predicted, labels).statistic)  # of two binary variables it is Matthews'
    return pearson if metric == "matthews" else (pearson + float(spearmanr(predicted, labels).statistic)) / 2


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: list[Batch], metric: str = "accuracy") -> dict[str, float]:
    model.eval()
    loss, predicted, answers = 0.0, [], []
    for batch in batches:
        logits, labels = logits_and_labels(model, batch)
        loss += loss_of(logits, labels, reduction="sum").item()
        predicted.append(logits if labels.is_floating_point() else logits.argmax(-1))
        answers.append(labels)
    labels = torch.cat(answers)
    return {"loss": loss / len(labels), metric: score(metric, torch.cat(predicted), labels)}
