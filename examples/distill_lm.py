"""Distil a language model: a student cut from its teacher, taught from a cache on disk.

    python examples/distill_lm.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct --data my.jsonl --output out/lm
    python examples/distill_lm.py --toy --output out/lm

The data are JSON lines with `prompt` and `completion` (or `messages`, or `text`), as SFTTrainer takes them. The student
is the first half of the teacher's layers, or `--depth` of them. The teacher runs once over the data, and its answers
are kept on disk. Prints the loss after plain training and after as many steps with the teacher. `--toy` takes seconds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from checking import above_zero, check, check_distillation, check_model, read_rows, whole
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_dynamic.trainers import KDSFTConfig, KDSFTTrainer, cache_teacher, truncate_to_exit


def toy() -> tuple[Any, Any, list[dict[str, str]]]:
    """A model that has not learned yet, and rows in which it can: counting by a step that the prompt shows."""
    words = Tokenizer(models.WordLevel({"</s>": 0, "?": 1} | {str(i): i + 2 for i in range(40)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>", unk_token="?")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}
    rows = [
        {"prompt": f"{i} {i + step} ", "completion": f"{i + 2 * step} {i + 3 * step}"}
        for step in (1, 2, 3)
        for i in range(40 - 3 * step)
    ]
    return LlamaForCausalLM(LlamaConfig(vocab_size=42, **sizes)), tokenizer, rows


def trainer_of(
    args: argparse.Namespace, name: str, model: Any, teacher: Any, parts: Any, tokenizer: Any, **more: Any
) -> KDSFTTrainer:
    values = {
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.batch_size,
        "kd_weight": args.kd_weight,
        "bf16": torch.accelerator.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 20,
        **more,
    }
    config = KDSFTConfig(str(Path(args.output) / name), **values)
    return KDSFTTrainer(
        model, teacher, config, train_dataset=parts["train"], eval_dataset=parts["test"], processing_class=tokenizer
    )


def main(args: argparse.Namespace, data: list[dict[str, Any]]) -> None:
    if args.toy:
        teacher, tokenizer, data = toy()
    else:
        teacher = AutoModelForCausalLM.from_pretrained(args.teacher)
        tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    parts = Dataset.from_list(data).train_test_split(test_size=0.1, seed=0)
    if args.toy:  # a pretrained teacher knows the data's language; this one has to learn it
        trainer_of(args, "teacher", teacher, None, parts, tokenizer, max_steps=250, learning_rate=5e-3).train()
    cache = Path(args.output) / "cache"
    filling = trainer_of(args, "filling", teacher, None, parts, tokenizer)
    added = cache_teacher(teacher, filling.get_train_dataloader(), cache, processing_class=tokenizer)
    added += cache_teacher(teacher, filling.get_eval_dataloader(), cache, processing_class=tokenizer)
    print(f"{added} rows of the teacher are in {cache}")
    for name, who in (("plain", None), ("distilled", f"cache:{cache}")):
        student = truncate_to_exit(teacher, args.depth)
        trainer = trainer_of(args, name, student, who, parts, tokenizer)
        trainer.train()
        found = trainer.evaluate()
        keys = ("loss", "kd", "agreement", "teacher_ce")
        print(f"{name}: {json.dumps({key: round(found[f'eval_{key}'], 4) for key in keys if f'eval_{key}' in found})}")
    folder = Path(args.output) / "student"
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"the student of {args.depth} layers is in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a causal language model")
    parser.add_argument("--data", help="JSON lines with prompt and completion, messages, or text")
    parser.add_argument("--output", required=True)
    parser.add_argument("--depth", type=whole(2), default=None, help="layers of the student; half of them by default")
    parser.add_argument("--steps", type=whole(1), help="200 by default, and 100 of the toy")
    parser.add_argument("--batch_size", type=whole(1), default=8)
    parser.add_argument("--learning_rate", type=above_zero)
    parser.add_argument("--kd_weight", default="0.5", help="a number, or a schedule such as '0:1 1:0.2'")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    check_distillation(parser, kd_weight=args.kd_weight)
    args.learning_rate = args.learning_rate or (5e-3 if args.toy else 1e-4)
    args.steps = args.steps or (100 if args.toy else 200)
    rows: list[dict[str, Any]] = []
    if not args.toy:
        if args.data is None:
            parser.error("--data: it is missing. Name a file of JSON lines with prompt and completion, or pass --toy.")
        check_model(parser, "--teacher", args.teacher)
        rows = read_rows(parser, "--data", args.data, ("prompt", "completion"), ("messages",), ("text",))
        check(parser, len(rows) > 1, "--data", args.data, "a file of two rows or more: one is kept to evaluate")
        from transformers import AutoConfig

        layers = AutoConfig.from_pretrained(args.teacher).get_text_config().num_hidden_layers
    else:
        layers = 4
    args.depth = layers // 2 if args.depth is None else args.depth
    check(parser, args.depth < layers, "--depth", args.depth, f"less than the teacher's {layers} layers")
    main(args, rows)
