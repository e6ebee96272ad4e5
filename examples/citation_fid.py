"""Teach a T5 to cite, as Fusion-in-Decoder with transformers' Seq2SeqTrainer: your rows in, a T5 and its answers out.

    python examples/citation_fid.py --rows my.jsonl --model google/flan-t5-small --output_dir out/fid \
        --learning_rate 5e-4 --num_train_epochs 6

A row is {"question": ..., "passages": [{"title": ..., "text": ...}, ...], "answer": "... [1]. ... [2][3]."}. All
settings of Seq2SeqTrainingArguments are options. The report on the data and the scores of questions held out are
printed; the answers are in answers.jsonl and, to look at, in report.html. What is saved is an ordinary T5, or with
--lora_r an adapter for one.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from checking import check, check_model, read_rows, read_settings
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments
from trl import TrlParser

from peft_dynamic.trainers import (
    CitationReport,
    FiDDataCollator,
    FiDForConditionalGeneration,
    answer_questions,
    build_citation_dataset,
    evaluate_citations,
)


@dataclass
class CitationArguments:
    rows: str = field(metadata={"help": "JSON lines with question, passages and cited answer"})
    model: str = field(metadata={"help": "a T5, Flan-T5, mT5 or umT5"})
    passages: int = field(default=5, metadata={"help": "passages of each row: filled up or cut down to it"})
    out_of_range: str = field(default="drop", metadata={"help": "drop or repair answers with ids of no passage"})
    max_length: int = field(default=256, metadata={"help": "tokens of an encoder input, question included"})
    passages_per_pass: int | None = field(
        default=None, metadata={"help": "encode so many passages at a time, checkpointed, to save memory"}
    )
    lora_r: int | None = field(default=None, metadata={"help": "train a LoRA of this rank; all parameters without it"})
    held: float = field(default=0.1, metadata={"help": "share of the questions that is kept for evaluation"})
    max_new_tokens: int = field(default=200, metadata={"help": "of the answers to these"})
    num_beams: int = field(default=1, metadata={"help": "of the answers to these"})
    judge: str | None = field(default=None, metadata={"help": "an entailment model for citation precision and recall"})


def main(
    citation: CitationArguments, training: Seq2SeqTrainingArguments, dataset: Dataset, report: CitationReport
) -> None:
    print(report)
    questions = sorted({*dataset["question"]})
    held = {*random.Random(training.seed).sample(questions, max(1, round(citation.held * len(questions))))}
    train = dataset.filter(lambda row: row["question"] not in held)
    test = dataset.filter(lambda row: row["question"] in held).to_list()

    tokenizer = AutoTokenizer.from_pretrained(citation.model)
    model = FiDForConditionalGeneration.from_pretrained(citation.model)
    model.checkpoint_passages(citation.passages_per_pass)
    if citation.lora_r is not None:
        model = get_peft_model(
            model, LoraConfig(r=citation.lora_r, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
        )
    collator = FiDDataCollator(tokenizer, max_length=citation.max_length)
    training.remove_unused_columns = False  # the collator makes the tokens
    trainer = Seq2SeqTrainer(model, training, collator, train, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()

    options = {"max_new_tokens": citation.max_new_tokens, "num_beams": citation.num_beams}
    texts = answer_questions(trainer.model, collator, test, **options)
    answered = [{**row, "output": text} for row, text in zip(test, texts, strict=True)]
    folder = Path(training.output_dir)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered), encoding="utf-8")
    evaluation = evaluate_citations(answered, citation.judge)
    evaluation.report(folder / "report.html")
    print(evaluation.table())


if __name__ == "__main__":
    parser = TrlParser((CitationArguments, Seq2SeqTrainingArguments))
    citation, training = read_settings(parser)
    check(parser, citation.passages >= 1, "--passages", citation.passages, "at least 1")
    check(parser, 0 < citation.held < 1, "--held", citation.held, "a share above 0 and below 1, such as 0.1")
    check(parser, citation.max_new_tokens >= 1, "--max_new_tokens", citation.max_new_tokens, "at least 1")
    ways = ("drop", "repair")
    check(parser, citation.out_of_range in ways, "--out_of_range", citation.out_of_range, "drop or repair")
    for name in ("passages_per_pass", "lora_r", "max_length", "num_beams"):
        value = getattr(citation, name)
        check(parser, value is None or value >= 1, f"--{name}", value, "at least 1")
    check_model(parser, "--model", citation.model)
    rows = read_rows(parser, "--rows", citation.rows, ("question", "passages", "answer"))
    how = {"passages": citation.passages, "out_of_range": citation.out_of_range, "seed": training.seed}
    try:
        dataset, report = build_citation_dataset(rows, **how)
    except ValueError as error:
        parser.error(f"--rows {citation.rows}: {' '.join(str(error).split())}")
    several = len({*dataset["question"]}) > 1
    check(parser, several, "--rows", citation.rows, "a file of two questions or more: one is kept for evaluation")
    main(citation, training, dataset, report)
