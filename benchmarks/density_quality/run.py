"""Density and score of a fine-tuned MiniLM and a T5-small with and without the density loss.

Training starts with `before` steps on the task alone. From there each way goes on for `after` steps, the run with
neither loss nor cut among them: it has the same steps, batches and learning rates. The weight of the loss rises over
the first 30 % of these. "relu" puts a ReLU in place of the model's GELU before training, with and without the loss. The
T5 writes its answers: the words positive and negative, or the answer of SQuAD, scored by its F1 over words.
"""

import copy
import random
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    set_seed,
)

from benchmarks.study import Cell, Context
from benchmarks.tasks import Data, Task, evaluate, logits_and_labels, loss_of
from benchmarks.tasks import read as read_rows
from benchmarks.training import adamw, descended, fit
from peft_dynamic import ActivationDensityLoss, calibrate_cut, cut_activations, measure_density
from peft_dynamic.hosts.quantization import unpack_bnb_4bit

TARGETS = {"minilm": ["query", "value", "intermediate.dense", "output.dense"], "t5": ["q", "v", "wi_0", "wi_1", "wo"]}
RAMP, THRESHOLD = 0.3, 0.1
CALIBRATION = 8  # batches


def prepared(name: str, adapter: str, activation: str, seed: int, models: Path) -> Any:
    set_seed(seed)
    extra: dict[str, Any] = {"attn_implementation": "eager"}
    if adapter == "qlora":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=["classifier", "lm_head"],
        )
    kind = "t5" if name.startswith("t5-") else "minilm"
    auto: Any = AutoModelForSeq2SeqLM
    if kind == "t5":
        extra |= {"dropout_rate": 0.0} | ({"dense_act_fn": "relu"} if activation == "relu" else {})
    else:
        auto = AutoModelForSequenceClassification
        extra |= {"num_labels": 1 if name == "stsb" else 2, "hidden_act": activation}
        extra |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = auto.from_pretrained(models / kind, dtype=torch.float32, **extra)
    if adapter == "qlora":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    # The biases too: that of the layer before the activation is what moves a neuron as a whole. T5 has none.
    task_type = "SEQ_2_SEQ_LM" if kind == "t5" else "SEQ_CLS"
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS[kind], task_type=task_type, bias="lora_only")
    )
    unpack_bnb_4bit(model)  # bitsandbytes packs its weights in an evaluation, and then trains nothing
    return model


class Texts:
    """What a T5 reads and writes: batches of tokens, and the answers that count as right for each evaluated row."""

    def __init__(self, name: str, task: dict[str, Any], data: Path, models: Path) -> None:
        self.name, self.size, self.max_length = name, task["batch_size"], task["max_length"]
        self.tokenizer = AutoTokenizer.from_pretrained(models / "t5")
        folder = data / ("sst2" if name == "t5-sst2" else "squad_xquad_en")
        self.train = [self.encoded(row) for row in read_rows(folder / "train.jsonl")]
        rows = sorted(map(self.encoded, read_rows(folder / "validation.jsonl")), key=lambda row: len(row["input_ids"]))
        parts = [rows[i : i + 32] for i in range(0, len(rows), 32)]
        self.evaluation, self.answers = [*map(self.collated, parts)], [row["answers"] for row in rows]

    def encoded(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.name == "t5-sst2":
            text, answers = f"sst2 sentence: {row['sentence']}", [("negative", "positive")[row["label"]]]
        else:
            text, answers = f"question: {row['question']} context: {row['context']}", row["answers"]
        ids = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        return {"input_ids": ids, "labels": self.tokenizer(answers[0])["input_ids"], "answers": answers}

    def collated(self, rows: list[dict[str, Any]]) -> Any:
        rows = [{k: row[k] for k in ("input_ids", "labels")} for row in rows]
        return DataCollatorForSeq2Seq(self.tokenizer)(rows, return_tensors="pt")

    def batches(self, steps: int, seed: int) -> Iterator[Any]:
        draw = random.Random(seed)
        for _ in range(steps):
            yield self.collated(draw.sample(self.train, self.size))

    @torch.no_grad()
    def score(self, model: Any) -> float:
        """Share of right words, or the mean F1 over words against the nearest answer."""
        model.eval()
        said: list[str] = []
        for batch in self.evaluation:
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            with torch.autocast("cpu", torch.bfloat16):
                ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
            said += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        if self.name == "t5-sst2":
            return statistics.mean(text == right for text, (right,) in zip(said, self.answers, strict=True))
        return statistics.mean(
            max(overlap(text, answer) for answer in right) for text, right in zip(said, self.answers, strict=True)
        )


def overlap(text: str, answer: str) -> float:
    said, right = (Counter(re.findall(r"\w+", words.lower())) for words in (text, answer))
    return 2 * (said & right).total() / max(1, (said + right).total())


def task_loss(model: Any, batch: Any) -> torch.Tensor:
    if batch["labels"].dim() == 1:
        return loss_of(*logits_and_labels(model, batch))
    with torch.autocast("cpu", torch.bfloat16):
        return model(**batch).loss


class Training:
    """A model after its steps on the task alone, from which each way of going on starts anew."""

    def __init__(self, model: Any, batches: list[Any], lr: float, before: int) -> None:
        self.model, self.batches, self.lr, self.before = model, batches, lr, before
        self.optimizer = adamw(model.parameters(), lr)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.go(0, before)
        self.saved = [p.detach().clone() for p in self.parameters], copy.deepcopy(self.optimizer.state_dict())

    def restart(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.saved[0], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(self.saved[1]))

    def go(self, first: int, last: int, weight: float = 0.0, eps: float = 1e-2, stack: str = "") -> None:
        """Linear warm-up over 6 % of all steps; linear decay over the last 70 %."""
        total = len(self.batches)
        others = {other: 0.0 for other in ("encoder", "decoder") if stack not in ("", other)}
        density = (
            ActivationDensityLoss(weight, eps, layer_weights=others or None).attach(self.model) if weight else None
        )

        def backward(step: int) -> float:
            if density is not None:
                density.weight = weight * min(1.0, (step - first + 1) / (RAMP * (last - first)))
            loss = task_loss(self.model, self.batches[step])
            if density is not None and self.batches[step]["labels"].dim() == 1:  # T5's own loss has the term in it
                loss = loss + density.penalty()
            return descended(loss)

        def share(done: int) -> float:
            step = first + done
            return min(1.0, (step + 1) / (0.06 * total), (total - step) / (0.7 * total))

        for group in self.optimizer.param_groups:
            group["lr"] = self.lr  # what a schedule begins with
        self.model.train()
        fit(self.optimizer, LambdaLR(self.optimizer, share), range(first, last), backward)
        if density is not None:
            density.detach()


def assess(model: Any, data: Any, metric: str, cut: float) -> tuple[float, Any]:
    """Score and density, with the activations of at most `cut` set to 0."""
    writes = isinstance(data, Texts)
    batches = [{k: v for k, v in batch.items() if writes or k != "labels"} for batch in data.evaluation]
    with cut_activations(model, cut) if cut else nullcontext():
        score = data.score(model) if writes else evaluate(model, data.evaluation, metric)[metric]
        return score, measure_density(model, batches, threshold=THRESHOLD, max_batches=4)


@lru_cache(maxsize=1)  # the cells of a start come one after another
def started(start: tuple[tuple[str, Any], ...], context: Context) -> tuple[Training, Any]:
    cell, paths = dict(start), context.paths
    name, steps = cell["task"], cell["before"] + cell["after"]
    task = context.settings["tasks"][name]
    if name.startswith("t5-"):
        data: Any = Texts(name, task, paths["data"], paths["models"])
    else:
        rows = Task("minilm", [], task["max_length"], task["batch_size"])
        data = Data(name, rows, paths["data"], paths["models"])
    if some := context.settings["evaluated"]:
        data.evaluation = data.evaluation[:some]
        if isinstance(data, Texts):
            data.answers = data.answers[: sum(len(batch["labels"]) for batch in data.evaluation)]
    model = prepared(name, cell["adapter"], cell["activation"], cell["seed"], paths["models"])
    return Training(model, list(data.batches(steps, cell["seed"])), cell["lr"], cell["before"]), data


def run(cell: Cell, context: Context) -> dict[str, Any]:
    shared = ("task", "adapter", "activation", "seed", "before", "after", "lr")
    training, data = started(tuple((name, cell[name]) for name in shared), context)
    training.restart()
    model, keep, stack = training.model, cell["keep"], cell["stack"]
    metric = context.settings["tasks"][cell["task"]]["metric"]
    threshold: Any = cell["train_cut"]
    if keep:
        threshold = calibrate_cut(model, training.batches[:CALIBRATION], keep, rf"{stack}\..*act" if stack else None)
    with cut_activations(model, threshold) if threshold else nullcontext():
        training.go(cell["before"], cell["before"] + cell["after"], cell["weight"], cell["eps"], stack)
        score, density = assess(model, data, metric, 0.0)
    found = {
        "score": score,
        "exact": density.mean(),
        "stacks": {part: density.mean(part) for part in dict.fromkeys(row.stack for row in density.rows)},
        "above": density.mean(exact=False),
        "layers": [row.exact for row in density.rows],
    }
    if context.settings["cuts"] and not threshold:
        after = {str(size): assess(model, data, metric, size) for size in context.settings["cuts"]}
        found["cuts"] = {size: {"score": score, "exact": density.mean()} for size, (score, density) in after.items()}
    return found
