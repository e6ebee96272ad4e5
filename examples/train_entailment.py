"""Train a small judge of support: does a passage support a statement? For `evaluate_citations` on one's own machine.

    python examples/train_entailment.py --model MODEL --train mnli.jsonl claims.jsonl --eval mnli=mnli_val.jsonl

MODEL is a T5, which learns to answer yes or no, or an encoder, which gets the classes `not_supported` and `supported`.
All of it but the embeddings is trained. A line of a file (.jsonl or .jsonl.gz) is either of natural language inference,
`premise`, `hypothesis` and `label` (0 is entailment, all else is no support), or of attribution, `claim`, `references`
(a list of texts) and `label` (`attributable` is support). Some pairs with a premise of another row are added as not
supported, because the negatives of such data are all on the subject. OUTPUT/model then goes into
`evaluate_citations(rows, "OUTPUT/model")`, and OUTPUT/scores.json has what it is worth on each evaluation file.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from checking import above_zero, check, check_model, read_rows, whole
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from peft_dynamic.trainers import EntailmentModel, measure_entailment

LABELS = ["not_supported", "supported"]
# A question that FLAN was trained on.
TEMPLATE = '{premise} Based on the paragraph above can we conclude that "{hypothesis}"? OPTIONS: - yes - no'
Pair = tuple[str, str, bool]


def pairs_of(rows: list[dict[str, Any]]) -> list[Pair]:
    """(premise, hypothesis, supported) of each row."""
    return [
        (row["premise"], row["hypothesis"], row["label"] == 0)
        if "premise" in row
        else ("\n".join(row["references"]), row["claim"], row["label"] == "attributable")
        for row in rows
    ]


def with_irrelevant(pairs: list[Pair], share: float, rng: random.Random) -> list[Pair]:
    """The pairs, and `share` as many more of a supported hypothesis with the premise of another row."""
    supported = [hypothesis for _, hypothesis, label in pairs if label]
    chosen = rng.sample(supported, min(len(supported), round(share * len(pairs))))
    return pairs + [(rng.choice(pairs)[0], hypothesis, False) for hypothesis in chosen]


def load(name: str) -> tuple[Any, Any]:
    config = AutoConfig.from_pretrained(name)
    if config.is_encoder_decoder:
        config.update({"entailment_template": TEMPLATE, "entailment_answers": ["yes", "no"]})
        model = AutoModelForSeq2SeqLM.from_pretrained(name, config=config, dtype=torch.float32)
        model.get_output_embeddings().requires_grad_(False)
    else:
        config.update({"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}})
        model = AutoModelForSequenceClassification.from_pretrained(name, config=config, attn_implementation="eager")
    model.get_input_embeddings().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(name)


def encoded(pairs: list[Pair], judge: EntailmentModel) -> list[dict[str, Any]]:
    answers = [judge.tokenizer(answer)["input_ids"] if judge.generates else i for i, answer in enumerate(("no", "yes"))]
    return [judge.encode(premise, hypothesis) | {"labels": answers[label]} for premise, hypothesis, label in pairs]


def main(arguments: argparse.Namespace, files: list[list[Pair]], evaluations: dict[str, list[Pair]]) -> None:
    set_seed(arguments.seed)
    model, tokenizer = load(arguments.model)
    judge = EntailmentModel(model, tokenizer, max_length=arguments.max_length)
    draw, rng = random.Random(arguments.seed), random.Random(arguments.seed)
    if arguments.rows is not None:
        files = [draw.sample(pairs, rows) for pairs, rows in zip(files, arguments.rows, strict=True)]
    train = [pair for pairs in files for pair in with_irrelevant(pairs, arguments.irrelevant, rng)]
    checkpoints = arguments.output / "checkpoints"
    settings = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        warmup_steps=0.06,  # a share
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        bf16=arguments.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_steps=arguments.save_steps,
        save_total_limit=1,
        logging_steps=arguments.save_steps,
        report_to="none",
        seed=arguments.seed,
        disable_tqdm=True,
    )
    collate = DataCollatorForSeq2Seq(tokenizer) if judge.generates else DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, settings, train_dataset=encoded(train, judge), data_collator=collate)
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    model.eval().save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")

    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    judge = EntailmentModel(arguments.output / "model", dtype=dtype, max_length=arguments.eval_max_length)
    scores = {}
    for name, pairs in evaluations.items():
        premises, hypotheses, labels = zip(*pairs, strict=True)
        scores[name] = measure_entailment(judge, premises, hypotheses, labels)
        print(name, json.dumps(scores[name]))
    (arguments.output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def named(text: str) -> tuple[str, Path]:
    name, _, path = text.rpartition("=")
    return name or Path(path).stem, Path(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a T5 or an encoder, from the Hub or a folder")
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=whole(1), nargs="+", help="rows to draw of each training file; default: all")
    parser.add_argument("--eval", type=named, nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--output", type=Path, default=Path("out/entailment"))
    parser.add_argument("--epochs", type=above_zero, default=4)
    parser.add_argument("--batch-size", type=whole(1), default=32)
    parser.add_argument("--lr", type=above_zero, default=1e-4)
    parser.add_argument("--max-length", type=whole(1), default=256)
    parser.add_argument(
        "--eval-max-length",
        type=whole(1),
        default=512,
        help="a T5 reads longer premises too, at a price in memory",
    )
    parser.add_argument(
        "--irrelevant", type=float, default=0.1, help="how many pairs to add with another row's premise"
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--save-steps", type=whole(1), default=100, help="a run goes on from its last checkpoint")
    parser.add_argument("--seed", type=whole(0), default=0)
    given = parser.parse_args()
    check_model(parser, "--model", given.model)
    check(parser, given.irrelevant >= 0, "--irrelevant", given.irrelevant, "a share of at least 0, such as 0.1")
    forms = (("premise", "hypothesis", "label"), ("claim", "references", "label"))
    files = [pairs_of(read_rows(parser, "--train", path, *forms)) for path in given.train]
    evaluations = {name: pairs_of(read_rows(parser, "--eval", path, *forms)) for name, path in given.eval}
    if given.rows is not None:
        fits = len(given.rows) == len(files)
        check(parser, fits, "--rows", given.rows, f"a number for each of the {len(files)} files of --train")
        for wanted, pairs, path in zip(given.rows, files, given.train, strict=True):
            check(parser, wanted <= len(pairs), "--rows", wanted, f"at most {len(pairs)}, the rows of {path}")
    main(given, files, evaluations)
