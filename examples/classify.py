"""Fine-tune a classifier with any adapter of this package (or stock LoRA, to compare) and transformers' Trainer.

    python examples/classify.py --model MODEL --train train.jsonl --eval eval.jsonl --method loretta-rep

Each line of the files has `sentence`, or `sentence1` and `sentence2`, and an integer `label`. MODEL is an encoder or a
decoder, from the Hub or a folder. The trained adapter is in OUTPUT/adapter; for a method whose adapter is a LoRA in the
end, OUTPUT/lora loads in PEFT without this package.
"""

import argparse
from pathlib import Path
from typing import Any

from checking import above_zero, check, check_model, read_rows, whole
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_dynamic import DyLoRAConfig, LorettaAdpConfig, LorettaRepConfig, MoSLoRAConfig, export_lora

CONFIGS = {
    "lora": lambda: LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16),
    "dylora": lambda: DyLoRAConfig(task_type="SEQ_CLS", r=8, ranks=[1, 2, 4, 8], lora_alpha=16),
    "moslora": lambda: MoSLoRAConfig(task_type="SEQ_CLS", r=8, lora_alpha=16),
    "lamda": lambda: MoSLoRAConfig.lamda(task_type="SEQ_CLS", r=8, lora_alpha=16),
    "loretta-rep": lambda: LorettaRepConfig(task_type="SEQ_CLS"),
    "loretta-adp": lambda: LorettaAdpConfig(task_type="SEQ_CLS"),
}


def tokens(read: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    texts = [[row["sentence"]] if "sentence" in row else [row["sentence1"], row["sentence2"]] for row in read]
    return [
        {**tokenizer(*text, truncation=True, max_length=max_length), "labels": row["label"]}
        for text, row in zip(texts, read, strict=True)
    ]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(arguments: argparse.Namespace, files: list[list[dict[str, Any]]]) -> None:
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train, evaluation = (tokens(rows, tokenizer, arguments.max_length) for rows in files)
    labels = 1 + max(row["labels"] for row in train)
    base = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=labels)
    if base.config.pad_token_id is None:  # a decoder's classifier looks for the last token that is no padding
        base.config.pad_token_id = tokenizer.pad_token_id
    model = get_peft_model(base, CONFIGS[arguments.method]())
    model.print_trainable_parameters()
    settings = TrainingArguments(
        output_dir=str(arguments.output / "checkpoints"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        warmup_steps=arguments.steps // 20,
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    print(f"{arguments.method}: accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    model.save_pretrained(str(arguments.output / "adapter"))
    if arguments.method in ("dylora", "moslora", "lamda", "loretta-rep"):
        print(f"as a stock LoRA adapter: {export_lora(model, arguments.output / 'lora')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--method", choices=CONFIGS, default="moslora")
    parser.add_argument("--output", type=Path, default=Path("out/classify"))
    parser.add_argument("--steps", type=whole(1), default=300)
    parser.add_argument("--batch-size", type=whole(1), default=32)
    parser.add_argument("--lr", type=above_zero, default=2e-3)
    parser.add_argument("--max-length", type=whole(1), default=128)
    parser.add_argument("--seed", type=whole(0), default=0)
    given = parser.parse_args()
    check_model(parser, "--model", given.model)
    forms = (("sentence", "label"), ("sentence1", "sentence2", "label"))
    files = [read_rows(parser, option, getattr(given, option[2:]), *forms) for option in ("--train", "--eval")]
    most = max((row["label"] for row in files[0] if type(row["label"]) is int), default=-1)
    for option, rows in zip(("--train", "--eval"), files, strict=True):
        for row in rows:
            fine = type(row["label"]) is int and 0 <= row["label"] <= most
            rule = "a whole number from 0, and one that is in --train too"
            check(parser, fine, f"{option} {getattr(given, option[2:])}: the label", repr(row["label"]), rule)
    main(given, files)
