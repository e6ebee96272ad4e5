"""Teach a decoder-only model to cite, with TRL's SFTTrainer: your rows in, an adapter and its cited answers out.

    python examples/citation_sft.py --rows my.jsonl --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --output_dir out/citer --use_peft --lora_target_modules all-linear --learning_rate 5e-4 --num_train_epochs 3

A row is {"question": ..., "passages": [{"title": ..., "text": ...}, ...], "answer": "... [1]. ... [2][3]."}. All
settings of SFTConfig and TRL's ModelConfig are options. The report on the data and the scores of questions held out are
printed; the answers are in answers.jsonl and, to look at, in report.html.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from checking import check, check_model, read_rows, read_settings
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from peft_dynamic.trainers import (
    CitationDataCollator,
    CitationReport,
    answer_questions,
    build_citation_dataset,
    citation_prompt_completion,
    evaluate_citations,
)


@dataclass
class CitationArguments:
    rows: str = field(metadata={"help": "JSON lines with question, passages and cited answer"})
    passages: int = field(default=5, metadata={"help": "passages of each row: filled up or cut down to it"})
    out_of_range: str = field(default="drop", metadata={"help": "drop or repair answers with ids of no passage"})
    format: str = field(default="alce", metadata={"help": "alce or citer"})
    held: float = field(default=0.1, metadata={"help": "share of the questions that is kept for evaluation"})
    max_new_tokens: int = field(default=200, metadata={"help": "of the answers to these"})
    judge: str | None = field(default=None, metadata={"help": "an entailment model for citation precision and recall"})


def main(
    citation: CitationArguments,
    training: SFTConfig,
    model_config: ModelConfig,
    dataset: Dataset,
    report: CitationReport,
) -> None:
    print(report)
    questions = sorted({*dataset["question"]})
    held = {*random.Random(training.seed).sample(questions, max(1, round(citation.held * len(questions))))}
    train = dataset.filter(lambda row: row["question"] not in held)
    test = dataset.filter(lambda row: row["question"] in held).to_list()

    tokenizer = AutoTokenizer.from_pretrained(model_config.model_name_or_path)
    shape = {"format": citation.format, "max_length": training.max_length}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model_config.model_name_or_path, dtype=model_config.dtype),
        training,
        train_dataset=citation_prompt_completion(train, tokenizer, **shape),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
    )
    trainer.train()
    trainer.save_model()

    collator = CitationDataCollator(tokenizer, **shape)
    texts = answer_questions(trainer.model, collator, test, max_new_tokens=citation.max_new_tokens)
    answered = [{**row, "output": text} for row, text in zip(test, texts, strict=True)]
    folder = Path(training.output_dir)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered), encoding="utf-8")
    evaluation = evaluate_citations(answered, citation.judge)
    evaluation.report(folder / "report.html")
    print(evaluation.table())


if __name__ == "__main__":
    parser = TrlParser((CitationArguments, SFTConfig, ModelConfig))
    citation, training, model_config = read_settings(parser)
    check(parser, citation.passages >= 1, "--passages", citation.passages, "at least 1")
    check(parser, 0 < citation.held < 1, "--held", citation.held, "a share above 0 and below 1, such as 0.1")
    check(parser, citation.max_new_tokens >= 1, "--max_new_tokens", citation.max_new_tokens, "at least 1")
    ways = ("drop", "repair")
    check(parser, citation.out_of_range in ways, "--out_of_range", citation.out_of_range, "drop or repair")
    check(parser, citation.format in ("alce", "citer"), "--format", citation.format, "alce or citer")
    check_model(parser, "--model_name_or_path", model_config.model_name_or_path)
    rows = read_rows(parser, "--rows", citation.rows, ("question", "passages", "answer"))
    how = {"passages": citation.passages, "out_of_range": citation.out_of_range, "seed": training.seed}
    try:
        dataset, report = build_citation_dataset(rows, **how)
    except ValueError as error:
        parser.error(f"--rows {citation.rows}: {' '.join(str(error).split())}")
    several = len({*dataset["question"]}) > 1
    check(parser, several, "--rows", citation.rows, "a file of two questions or more: one is kept for evaluation")
    main(citation, training, model_config, dataset, report)
