"""Distil an adapter into a smaller one: a LoRA teaches a LoRETTA over the same base, whose weights are there once.

    python examples/distill_adapter.py --adapter my-lora --data my.jsonl --output out/small
    python examples/distill_adapter.py --toy --output out/small

`--adapter` is the folder of a classifier's LoRA, with its base model's name in it, and the data are JSON lines with
`text` and `label`; a tenth is kept to evaluate. `--toy` trains a base and a LoRA first. Prints how many numbers each
adapter trains, and how well the small one does after the labels alone and after the same steps with the LoRA's help.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from checking import above_zero, check, check_distillation, read_rows, whole
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from peft_dynamic import LorettaRepConfig
from peft_dynamic.trainers import KDConfig, KDTrainer

TARGETS = ["query", "value"]


def toy(output: Path) -> tuple[str, Dataset, Any]:
    """The folder of a LoRA over a small model that has learned the first of two tasks, and rows of the second."""

    def rows(limit: int) -> Dataset:
        draw = random.Random(limit)
        ids = [[draw.randrange(2, 32) for _ in range(9)] for _ in range(1000)]
        labels = [int(sum(i < limit for i in each) > 4) for each in ids]
        return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 9] * 1000, "labels": labels})

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    set_seed(0)
    base = BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=2, **sizes))
    settings = {"report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 32, "learning_rate": 3e-3}

    def fit(model: Any, data: Dataset, steps: int) -> None:
        arguments = TrainingArguments(str(output / "toy"), max_steps=steps, **settings)
        Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator).train()

    fit(base, rows(17), 100)
    base.save_pretrained(output / "base")
    base = BertForSequenceClassification.from_pretrained(output / "base")
    adapted = get_peft_model(base, LoraConfig(r=16, target_modules=TARGETS, task_type="SEQ_CLS"))
    second = rows(9)
    fit(adapted, second, 150)
    adapted.save_pretrained(output / "lora")
    return str(output / "lora"), second, default_data_collator


def student_of(args: argparse.Namespace, base: str, classes: int) -> Any:
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    settings = {"bottleneck": args.rank, "tensor_rank": args.tensor_rank, "train_layer_norms": False}
    return get_peft_model(model, LorettaRepConfig(target_modules=args.targets, task_type="SEQ_CLS", **settings))


def main(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    output = Path(args.output)
    adapter, data, collator = toy(output) if args.toy else (args.adapter, None, None)
    base, classes = PeftConfig.from_pretrained(adapter).base_model_name_or_path, 2
    if data is None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        classes = 1 + max(row["label"] for row in rows)
        texts = tokenizer([row["text"] for row in rows], truncation=True, max_length=args.max_length)
        data = Dataset.from_dict({**texts, "labels": [row["label"] for row in rows]})
        collator = DataCollatorWithPadding(tokenizer)
    parts = data.train_test_split(test_size=0.1, seed=args.seed)
    for name, teacher in (("the labels alone", None), ("the LoRA too", adapter)):
        student = student_of(args, base, classes)
        config = KDConfig(
            str(output / "checkpoints"),
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=32,
            kd_weight=args.kd_weight,
            temperature=2.0,
            report_to="none",
            save_strategy="no",
            seed=args.seed,
        )
        data_of = {"train_dataset": parts["train"], "eval_dataset": parts["test"], "data_collator": collator}
        trainer = KDTrainer(student, teacher, config, **data_of)
        trainer.train()
        found = trainer.evaluate()
        trained = student.get_nb_trainable_parameters()[0]
        print(f"after {name}: accuracy {found['eval_accuracy']:.3f}, {trained:,} trained numbers")
    print(f"the LoRA: accuracy {found['eval_teacher_accuracy']:.3f}, agreement {found['eval_agreement']:.3f}")
    student.save_pretrained(output / "adapter")
    print(f"the small adapter is in {output / 'adapter'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="the folder of a classifier's LoRA")
    parser.add_argument("--data", help="JSON lines with text and label")
    parser.add_argument("--output", required=True)
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="modules of the small adapter")
    parser.add_argument("--rank", type=whole(1), default=8, help="LoRETTA's bottleneck")
    parser.add_argument("--tensor_rank", type=whole(1), default=2)
    parser.add_argument("--steps", type=whole(1), help="300 by default, and 100 of the toy")
    parser.add_argument("--learning_rate", type=above_zero, default=4e-3)
    parser.add_argument("--kd_weight", default="0.7", help="a number, or a schedule such as '0:1 1:0.2'")
    parser.add_argument("--max_length", type=whole(1), default=128)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    check_distillation(parser, kd_weight=args.kd_weight)
    args.steps = args.steps or (100 if args.toy else 300)
    rows: list[dict[str, Any]] = []
    if not args.toy:
        if args.adapter is None or args.data is None:
            parser.error("--adapter and --data: name both, or pass --toy")
        fine = (Path(args.adapter) / "adapter_config.json").is_file()
        check(parser, fine, "--adapter", args.adapter, "a folder with an adapter_config.json")
        rows = read_rows(parser, "--data", args.data, ("text", "label"))
        whole_labels = all(type(row["label"]) is int and row["label"] >= 0 for row in rows)
        check(parser, whole_labels, "--data", args.data, "rows whose labels are whole numbers from 0")
        check(parser, len(rows) > 1, "--data", args.data, "a file of two rows or more: one is kept to evaluate")
    main(args, rows)
