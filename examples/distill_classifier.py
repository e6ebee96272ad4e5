"""Distil a classifier: the same script for fine-tuning, label smoothing and a teacher.

    python examples/distill_classifier.py --model small --teacher my-large-classifier --data my.jsonl --output out/kd
    python examples/distill_classifier.py --toy --output out/kd

The data are JSON lines with `text` and `label`, a number from 0; a tenth is kept to evaluate. `--teacher` takes what
KDTrainer takes as text: a folder or name, smoothing, manual or ema. `--toy` trains a teacher of four layers first. It
then trains a student of one layer twice, on a few labels alone and with the teacher on all rows, in seconds.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from checking import above_zero, check, check_distillation, check_model, read_rows, whole
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    default_data_collator,
    set_seed,
)

from peft_dynamic.trainers import KDConfig, KDTrainer


def settings(args: argparse.Namespace, folder: str, **more: Any) -> KDConfig:
    values = {
        "num_train_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "kd_weight": args.kd_weight,
        "temperature": args.temperature,
        "per_device_train_batch_size": 32,
        "report_to": "none",
        "save_strategy": "no",
        "seed": args.seed,
        **more,
    }
    return KDConfig(str(Path(args.output) / folder), **values)


def toy_model(layers: int) -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": layers}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=2, **sizes, **none))


def toy_rows(count: int) -> list[dict[str, Any]]:
    """Whether a row has more words of the first half than of the second."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(2, 32) for _ in range(9)]
        rows.append({"input_ids": ids, "attention_mask": [1] * 9, "labels": int(sum(i < 17 for i in ids) > 4)})
    return rows


def toy(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    rows = toy_rows(1200)
    train, held = rows[:900], Dataset.from_list(rows[900:])
    few = [row if i < 40 else {**row, "labels": -100} for i, row in enumerate(train)]
    teacher = toy_model(4)
    common = {"eval_dataset": held, "data_collator": default_data_collator}
    whole_set = settings(args, "teacher", num_train_epochs=6, learning_rate=3e-3)
    KDTrainer(teacher, None, whole_set, train_dataset=Dataset.from_list(train), **common).train()
    for name, who, data, more in (
        ("40 labels", None, few[:40], {"max_steps": 120}),
        ("40 labels and the teacher", teacher, few, {"max_steps": 120}),
    ):
        set_seed(args.seed)
        config = settings(args, name.replace(" ", "-"), **more)
        trainer = KDTrainer(toy_model(1), who, config, train_dataset=Dataset.from_list(data), **common)
        trainer.train()
        found = trainer.evaluate()
        print(f"{name}: accuracy {found['eval_accuracy']:.3f}")
    print(f"the teacher: accuracy {found['eval_teacher_accuracy']:.3f}")


def main(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    classes = 1 + max(row["label"] for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes)
    texts = tokenizer([row["text"] for row in rows], truncation=True, max_length=args.max_length)
    data = Dataset.from_dict({**texts, "labels": [row["label"] for row in rows]})
    parts = data.train_test_split(test_size=0.1, seed=args.seed)
    trainer = KDTrainer(
        model,
        args.teacher,
        settings(args, "checkpoints"),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    found = trainer.evaluate()
    teacher = found.get("eval_teacher_accuracy")
    beside = "" if teacher is None else f", the teacher's {teacher:.3f}"
    print(f"accuracy {found['eval_accuracy']:.3f}{beside}")
    trainer.save_model(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the student: a model, or a classifier")
    parser.add_argument("--teacher", help="a classifier, or smoothing, manual, ema; labels alone without it")
    parser.add_argument("--data", help="JSON lines with text and label")
    parser.add_argument("--output", required=True)
    parser.add_argument("--epochs", type=above_zero, default=3.0)
    parser.add_argument("--learning_rate", type=above_zero)
    parser.add_argument("--kd_weight", default="0.5", help="a number, or a schedule such as '0:1 1:0.2'")
    parser.add_argument("--temperature", default="2.0")
    parser.add_argument("--max_length", type=whole(1), default=128)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    check_distillation(parser, kd_weight=args.kd_weight, temperature=args.temperature)
    args.learning_rate = args.learning_rate or (3e-3 if args.toy else 5e-5)
    if args.toy:
        toy(args)
    else:
        if args.data is None:
            parser.error("--data: it is missing. Name a file of JSON lines with text and label, or pass --toy.")
        check_model(parser, "--model", args.model)
        rows = read_rows(parser, "--data", args.data, ("text", "label"))
        check(parser, len(rows) > 1, "--data", args.data, "a file of two rows or more: one is kept to evaluate")
        fine = all(type(row["label"]) is int and row["label"] >= 0 for row in rows)
        check(parser, fine, "--data", args.data, "rows whose labels are whole numbers from 0")
        main(args, rows)
