"""A classifier from adapters that exist: learn how much each counts for a new task, and write one LoRA.

    python examples/learn_scales.py --source nli=runs/nli --source qa=runs/qa --data few.jsonl --output out/target
    python examples/learn_scales.py --toy --output out/target

`--source` is a name and the folder of a finished adapter, all of them over one base model, whose name the first one
has. The data are JSON lines with `text` and `label`, a number from 0; a fifth is kept to evaluate. `--toy` trains a
base and two LoRAs first, and has 40 rows of a third task. Prints the accuracy with the scales, and that of the one LoRA
that they fold into; with `--rank` this LoRA is cut, by what matters on the rows.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from checking import above_zero, check, read_rows, whole
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
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

from peft_dynamic import ScaLearnConfig, adapter_moments


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(model: Any, output: Path, collator: Any, steps: int, rate: float, **data: Any) -> Trainer:
    settings = {"report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 32}
    arguments = TrainingArguments(str(output / "checkpoints"), max_steps=steps, learning_rate=rate, **settings)
    return Trainer(model, arguments, data_collator=collator, compute_metrics=accuracy, **data)


def toy(output: Path) -> tuple[dict[str, str], dict[str, Dataset]]:
    """Two LoRAs over a small model, for other tasks than that of the rows: whether most words are below a limit."""

    def rows(limit: int, count: int, seed: int) -> Dataset:
        draw = random.Random(seed)
        ids = [[draw.randrange(2, 32) for _ in range(9)] for _ in range(count)]
        labels = [int(sum(i < limit for i in each) > 4) for each in ids]
        return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 9] * count, "labels": labels})

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    set_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=2, **sizes)).save_pretrained(output / "base")
    sources = {}
    for name, limit in {"low": 13, "high": 21}.items():
        base = BertForSequenceClassification.from_pretrained(output / "base")
        config = LoraConfig(r=4, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
        adapted = get_peft_model(base, config)
        trainer_of(adapted, output, default_data_collator, 80, 1e-2, train_dataset=rows(limit, 1000, limit)).train()
        adapted.save_pretrained(output / name)
        sources[name] = str(output / name)
    return sources, {"train_dataset": rows(17, 40, 1), "eval_dataset": rows(17, 400, 2)}


def main(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    output = Path(args.output)
    sources, data = toy(output) if args.toy else (args.source, {})
    base_name = PeftConfig.from_pretrained(next(iter(sources.values()))).base_model_name_or_path
    collator, classes = default_data_collator, 2
    if not args.toy:
        tokenizer = AutoTokenizer.from_pretrained(base_name)
        classes = 1 + max(row["label"] for row in rows)
        texts = tokenizer([row["text"] for row in rows], truncation=True, max_length=args.max_length)
        both = Dataset.from_dict({**texts, "labels": [row["label"] for row in rows]})
        parts = both.train_test_split(test_size=0.2, seed=args.seed)
        data = {"train_dataset": parts["train"], "eval_dataset": parts["test"]}
        collator = DataCollatorWithPadding(tokenizer)

    def base() -> Any:
        set_seed(args.seed)  # the same new head
        return AutoModelForSequenceClassification.from_pretrained(base_name, num_labels=classes)

    config = ScaLearnConfig(adapters=sources, shape=args.shape, shared=args.shared, task_type="SEQ_CLS")
    model = get_peft_model(base(), config)
    scales = sum(value.numel() for name, value in model.named_parameters() if ".lora_scales." in name)
    trainer = trainer_of(model, output, collator, args.steps, args.learning_rate, **data)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    print(f"{len(sources)} sources, {scales:,} scales: accuracy {before:.3f} before, ", end="")
    print(f"{trainer.evaluate()['eval_accuracy']:.3f} after")
    model.save_pretrained(output / "adapter")
    moments = None
    if args.rank is not None:
        batches = [{k: v.to(model.device) for k, v in batch.items()} for batch in trainer.get_train_dataloader()]
        moments = adapter_moments(model, batches)
    model.merge(output / "lora", rank=args.rank, moments=moments)
    folded = PeftModel.from_pretrained(base(), output / "lora")
    found = trainer_of(folded, output, collator, 1, 1e-3, eval_dataset=data["eval_dataset"]).evaluate()
    print(f"one LoRA of rank {PeftConfig.from_pretrained(output / 'lora').r}: accuracy {found['eval_accuracy']:.3f}")


def named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text}: it must be a name, = and a folder.")
    return name, folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=named, action="append", default=[], help="NAME=FOLDER of a finished adapter")
    parser.add_argument("--data", help="JSON lines with text and label")
    parser.add_argument("--output", required=True)
    parser.add_argument("--shape", choices=["vector", "scalar"], default="vector")
    parser.add_argument("--shared", action="store_true", help="one omega for all layers")
    parser.add_argument(
        "--rank", type=whole(1), help="of the LoRA in the end; without it the sum of the sources' ranks"
    )
    parser.add_argument("--steps", type=whole(1), help="200 by default, and 60 of the toy")
    parser.add_argument("--learning_rate", type=above_zero, default=6e-3)
    parser.add_argument("--max_length", type=whole(1), default=128)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    args.source, args.steps = dict(args.source), args.steps or (60 if args.toy else 200)
    rows: list[dict[str, Any]] = []
    if not args.toy:
        if not args.source or args.data is None:
            parser.error("--source and --data: name both, or pass --toy.")
        for name, folder in args.source.items():
            fine = (Path(folder) / "adapter_config.json").is_file()
            check(parser, fine, "--source", f"{name}={folder}", "a name, = and a folder with an adapter_config.json")
        rows = read_rows(parser, "--data", args.data, ("text", "label"))
        fine = all(type(row["label"]) is int and row["label"] >= 0 for row in rows)
        check(parser, fine, "--data", args.data, "rows whose labels are whole numbers from 0")
        check(parser, len(rows) > 4, "--data", args.data, "a file of five rows or more: a fifth is kept to evaluate")
    main(args, rows)
