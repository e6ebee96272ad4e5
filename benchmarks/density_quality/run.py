"""Density and score of fine-tuned MiniLM and a T5-small with and without the density loss.

    PYTHONPATH=. python benchmarks/density_quality/run.py --data DATA --models MODELS
        [--tasks sst2 mrpc qnli stsb t5-sst2 t5-squad] [--adapters lora qlora] [--activations relu gelu]
        [--weights 0 1 3 10] [--seeds 0 1 2] [--report]

One job is a task, an adapter, an activation and a seed. It trains the adapter for `--before` steps on the task alone.
From there each weight goes on for `--after` steps, 0 among them: the run without the loss has the same steps, batches
and learning rates. The weight rises over the first 30 % of these. Runs are appended to runs.jsonl, and those that are
there are not made again. "relu" puts a ReLU in place of the model's GELU before training, with and without the loss.
The T5 writes its answers: the words positive and negative, or the answer of SQuAD, scored by its F1 over words.
`--cuts` also evaluates what is trained with each activation of at most that size set to 0; `--train-cut` sets them to 0
while the density loss is on, in training and in evaluation, and trains without both beside it. `--keep 0.4` does the
same with a threshold per layer, calibrated on training batches at the end of the first part so that this share of its
activations is left. `--stack decoder` leaves a T5's encoder out, of the loss and of that cut.
"""

import argparse
import copy
import json
import random
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    set_seed,
)

from benchmarks.tasks import Data, Task, evaluate, logits_and_labels, loss_of
from benchmarks.tasks import read as read_rows
from peft_dynamic import ActivationDensityLoss, calibrate_cut, cut_activations, measure_density
from peft_dynamic.tuners.quantization import keep_training_on_cpu

TASKS = {  # task -> tokens, batch size, metric
    "sst2": (64, 32, "accuracy"),
    "mrpc": (96, 16, "accuracy"),
    "qnli": (96, 16, "accuracy"),
    "stsb": (64, 16, "correlation"),
    "t5-sst2": (64, 16, "accuracy"),
    "t5-squad": (384, 8, "f1"),
}
TARGETS = {"minilm": ["query", "value", "intermediate.dense", "output.dense"], "t5": ["q", "v", "wi_0", "wi_1", "wo"]}
RAMP, THRESHOLD = 0.3, 0.1
CALIBRATION = 8  # batches
# A seed whose run with neither scores less has not learned the task, and is not in the means
LEARNED = dict.fromkeys(TASKS, 0.7) | {"t5-squad": 0.5}
KEYS = ("task", "adapter", "activation", "before", "after", "eps", "lr", "seed")
WAYS = ("train_cut", "keep", "weight", "stack")
PANELS = {"relu": "ReLU, density loss", "cut": "GELU, one threshold", "keep": "GELU, a threshold per layer"}
HERE = Path(__file__).parent


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
    keep_training_on_cpu(model)  # bitsandbytes packs its weights in an evaluation, and then trains nothing
    return model


class Texts:
    """What a T5 reads and writes: batches of tokens, and the answers that count as right for each evaluated row."""

    def __init__(self, name: str, data: Path, models: Path) -> None:
        self.name, self.size = name, TASKS[name][1]
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
        ids = self.tokenizer(text, truncation=True, max_length=TASKS[self.name][0])["input_ids"]
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
    """The steps of a job, and where they start anew."""

    def __init__(self, model: Any, batches: list[Any], lr: float) -> None:
        self.model, self.batches, self.lr = model, batches, lr
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)

    def save(self) -> Any:
        return [p.detach().clone() for p in self.parameters], copy.deepcopy(self.optimizer.state_dict())

    def restore(self, saved: Any) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, saved[0], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(saved[1]))

    def go(self, first: int, last: int, weight: float = 0.0, eps: float = 1e-2, stack: str = "") -> None:
        """Linear warm-up over 6 % of all steps; linear decay over the last 70 %."""
        total = len(self.batches)
        others = {other: 0.0 for other in ("encoder", "decoder") if stack not in ("", other)}
        loss = ActivationDensityLoss(weight, eps, layer_weights=others or None)
        density = loss.attach(self.model) if weight else None
        self.model.train()
        for step in range(first, last):
            share = min(1.0, (step + 1) / (0.06 * total), (total - step) / (0.7 * total))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * share
            if density is not None:
                density.weight = weight * min(1.0, (step - first + 1) / (RAMP * (last - first)))
            total_loss = task_loss(self.model, self.batches[step])
            if density is not None and self.batches[step]["labels"].dim() == 1:  # T5's own loss has the term in it
                total_loss = total_loss + density.penalty()
            total_loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if density is not None:
            density.detach()


def assess(model: Any, data: Any, metric: str, cut: float) -> tuple[float, Any]:
    """Score and density, with the activations of at most `cut` set to 0."""
    writes = isinstance(data, Texts)
    batches = [{k: v for k, v in batch.items() if writes or k != "labels"} for batch in data.evaluation]
    with cut_activations(model, cut) if cut else nullcontext():
        score = data.score(model) if writes else evaluate(model, data.evaluation, metric)[metric]
        return score, measure_density(model, batches, threshold=THRESHOLD, max_batches=4)


def job(args: argparse.Namespace, name: str, adapter: str, activation: str, seed: int) -> None:
    key = {"task": name, "adapter": adapter, "activation": activation, "seed": seed}
    key |= {"before": args.before, "after": args.after, "eps": args.eps, "lr": args.lr}
    ways = [(args.train_cut, args.keep, weight) for weight in args.weights]
    ways = [(0.0, 0.0, 0.0), *ways] if args.train_cut or args.keep else ways
    done = read()

    def of(cut: float, keep: float, weight: float) -> dict[str, Any]:
        stack = args.stack if weight or keep else ""
        return key | {"train_cut": cut, "keep": keep, "weight": weight, "stack": stack}

    ways = [way for way in ways if not any(of(*way).items() <= run.items() for run in done)]
    if not ways:
        return
    length, size, metric = TASKS[name]
    task = Task("minilm", (), length, args.before + args.after, size, 0)
    writes = name.startswith("t5-")
    data: Any = Texts(name, args.data, args.models) if writes else Data(name, task, args.data, args.models)
    model = prepared(name, adapter, activation, seed, args.models)
    training = Training(model, list(data.batches(args.before + args.after, seed)), args.lr)
    training.go(0, args.before)
    saved = training.save()
    for cut, keep, weight in ways:
        training.restore(saved)
        threshold: Any = cut
        if keep:
            pattern = rf"{args.stack}\..*act" if args.stack else None
            threshold = calibrate_cut(model, training.batches[:CALIBRATION], keep, pattern)
        with cut_activations(model, threshold) if threshold else nullcontext():
            training.go(args.before, args.before + args.after, weight, args.eps, args.stack)
            score, report = assess(training.model, data, metric, 0.0)
        run = of(cut, keep, weight) | {
            "score": score,
            "exact": report.mean(),
            "stacks": {stack: report.mean(stack) for stack in dict.fromkeys(row.stack for row in report.rows)},
            "above": report.mean(exact=False),
            "layers": [row.exact for row in report.rows],
        }
        if args.cuts and not threshold:
            after = {str(size): assess(training.model, data, metric, size) for size in args.cuts}
            run["cuts"] = {size: {"score": score, "exact": report.mean()} for size, (score, report) in after.items()}
        with (HERE / "runs.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(run) + "\n")
        print(json.dumps(run), flush=True)


def read() -> list[dict[str, Any]]:
    path = HERE / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [{"train_cut": 0.0, "keep": 0.0, "lr": 2e-3, "stack": ""} | json.loads(line) for line in lines]


def report() -> None:
    """Prints a row for each setting that has its run without loss and cut, and draws those of three seeds and more."""
    plain_runs = [run for run in read() if run["train_cut"] == run["keep"] == run["weight"] == 0]
    failed = [run for run in plain_runs if run["score"] < LEARNED[run["task"]]]
    plain = {tuple(run[k] for k in KEYS): run for run in plain_runs if run not in failed}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in read():
        if tuple(run[k] for k in KEYS) in plain:
            groups.setdefault(tuple(run[k] for k in (*KEYS[:-1], *WAYS)), []).append(run)
    print(
        "| task, adapter, activation, steps | cut | weight | seeds | score | minus neither | active | reduction |\n"
        + "|---" * 8
        + "|"
    )
    curves: dict[tuple, list[tuple[float, float, float]]] = {}
    order = list(dict.fromkeys(key[: len(KEYS) - 1] for key in groups))
    for key, runs in sorted(groups.items(), key=lambda item: (order.index(item[0][: len(KEYS) - 1]), item[0])):
        name, adapter, activation, before, after, _, lr, cut, keep, weight, stack = key
        others = [plain[tuple(run[k] for k in KEYS)] for run in runs]
        changes = [100 * (run["score"] - other["score"]) for run, other in zip(runs, others, strict=True)]
        actives, less = [], []
        for part in runs[0].get("stacks", {"model": 0}):
            pairs = [(active_of(run, part), active_of(other, part)) for run, other in zip(runs, others, strict=True)]
            actives.append(100 * statistics.mean(own for own, _ in pairs))
            less.append(100 * statistics.mean(1 - own / other for own, other in pairs))
        if len(runs) > 2:
            panels = ["relu"] if activation == "relu" else ["keep"] if keep else ["cut"] if cut else ["cut", "keep"]
            for panel in panels:
                point = (actives[-1], statistics.mean(changes), statistics.stdev(changes))
                curves.setdefault((panel, name, adapter, before, after, lr), []).append(point)
        way = f"{f'{100 * keep:g} % kept' if keep else f'{cut:g}'} | {weight:g}{stack and f', {stack} only'}"
        print(
            f"| {name}, {adapter}, {activation}, {before} + {after} at {lr:g} | {way} | {len(runs)} | "
            f"{100 * statistics.mean(run['score'] for run in runs):.1f} | {statistics.mean(changes):+.1f} "
            f"({', '.join(f'{change:+.1f}' for change in changes)}) | "
            f"{', '.join(f'{active:.1f} %' for active in actives)} | {', '.join(f'{share:.1f} %' for share in less)} |"
        )
    for run in failed:
        print(
            f"left out, not learned: {', '.join(f'{key} {run[key]}' for key in KEYS)}, score {100 * run['score']:.1f}"
        )
    draw(curves)


def active_of(run: dict[str, Any], stack: str) -> float:
    return run["exact"] if stack == "model" else run["stacks"][stack]


def draw(curves: dict[tuple, list[tuple[float, float, float]]]) -> None:
    """A panel per way: points of score against the run with neither, by how many neurons are active.

    Of several settings of a task and adapter in a panel the first is drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(1, len(PANELS), sharey=True), strict=True))
    drawn = set()
    for (panel, name, adapter, *_), found in curves.items():
        if len(found) > 1 and (panel, name, adapter) not in drawn:  # more than the run with neither
            drawn.add((panel, name, adapter))
            actives, changes, spreads = zip(*sorted(found), strict=True)
            style: dict[str, Any] = {"marker": "o", "ms": 4, "capsize": 2, "lw": 1.2, "elinewidth": 0.6}
            style |= {"color": f"C{list(TASKS).index(name)}", "ls": "-" if adapter == "lora" else "--"}
            panels[panel].errorbar(actives, changes, spreads, label=f"{name}, {adapter}", **style)
    for panel, axis in panels.items():
        axis.axhline(-1, color="gray", lw=0.8, ls="--")
        axis.set_title(PANELS[panel])
        axis.set_xscale("log")
        ticks = [1, 3, 10, 30, 100]
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
        axis.set_xlabel("active neurons (T5: of its decoder), %")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    panels["relu"].set_ylabel("points of score against the run with neither")
    figure.savefig(HERE / "density.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--adapters", nargs="+", choices=["lora", "qlora"], default=["lora", "qlora"])
    parser.add_argument("--activations", nargs="+", choices=["relu", "gelu"], default=["relu"])
    parser.add_argument("--weights", nargs="+", type=float, default=[0, 1, 3, 10])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--before", type=int, default=100)
    parser.add_argument("--after", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--eps", type=float, default=1e-2)
    parser.add_argument("--train-cut", type=float, default=0.0)
    parser.add_argument("--keep", type=float, default=0.0)
    parser.add_argument(
        "--stack", choices=["", "encoder", "decoder"], default="", help="of a T5, loss and cut of this one only"
    )
    parser.add_argument("--cuts", nargs="+", type=float, default=[])
    parser.add_argument("--report", action="store_true", help="only print and draw what there is")
    args = parser.parse_args()
    if not args.report:
        for seed in args.seeds:
            for name in args.tasks:
                for adapter in args.adapters:
                    for activation in args.activations:
                        job(args, name, adapter, activation, seed)
    report()


if __name__ == "__main__":
    main()
