"""The rows of the study: what is trained on and what is answered, the same for both models.

Train: ALCE answers that people judged to be fully supported (with their two augmentations), ExpertQA answers of at
most 80 words, and questions of NQ with one or two sentences of their passages that hold the gold answer, copied and
cited by rule. Evaluated on: questions of each kind that no training row has.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.tasks import read
from peft_dynamic.citations.text import split_sentences
from peft_dynamic.trainers.citation.data import build_citation_dataset

Row = dict[str, Any]
PASSAGES, WINDOW, LONGEST = 3, 60, 80  # passages of a row; words of an NQ passage; words of an answer


def cleaned(doc: Row) -> Row:
    """Without the title that opens the text of NQ's passages a second time, and with plain quotes."""
    title, text = doc["title"], doc["text"].replace('""', '"')
    return {"title": title, "text": text.removeprefix(f"{title} ") if text.startswith(f"{title} {title}") else text}


def window(text: str, sentence: str, rng: random.Random) -> str:
    """About WINDOW words around a sentence, or from anywhere where it is empty."""
    words = text.split()
    if sentence:
        start = len(text[: text.index(sentence)].split())
        spare = max(WINDOW - len(sentence.split()), 0)
        first = max(start - rng.randint(0, spare), 0)
        return " ".join(words[first : first + max(WINDOW, start - first + len(sentence.split()))])
    first = rng.randint(0, max(len(words) - WINDOW, 0))
    return " ".join(words[first : first + WINDOW])


def with_answer(text: str, answers: list[str]) -> str:
    """The first whole sentence that holds one of the answers, or nothing."""
    for sentence in split_sentences(text)[1:-1]:
        if 8 <= len(sentence.split()) <= 40 and any(re.search(rf"\b{re.escape(a)}\b", sentence) for a in answers):
            return sentence
    return ""


def nq_rows(rows: list[Row], seed: int) -> Iterator[Row]:
    """Questions with an answer that copies and cites one or two sentences; `answers` are the gold ones."""
    for row in rows:
        rng = random.Random(f"{seed}:{row['id']}")
        docs = [cleaned(doc) for doc in row["docs"]]
        sentences = [with_answer(doc["text"], row["answers"]) for doc in docs]
        if not any(sentences):
            continue
        docs = [doc | {"text": window(doc["text"], s, rng)} for doc, s in zip(docs, sentences, strict=True)]
        said = [(i, s) for i, s in enumerate(sentences, 1) if s and s not in sentences[: i - 1]][:2]
        answer = " ".join(re.sub(r"([.!?]['\"]?)$", rf" [{i}]\1", s) for i, s in said)
        question = row["question"] if row["question"].endswith("?") else row["question"] + "?"
        yield {"question": question, "passages": docs, "answer": answer, "gold": row["answers"]}


def short(row: Row) -> bool:
    return len(row["answer"].split()) <= LONGEST and "\n" not in row["answer"]


def rows(data: Path, seed: int = 0) -> tuple[list[Row], list[Row], str]:
    """Training rows, rows to answer, and what became of all rows; `kind` says where a row is from."""
    alce = [
        row | {"answer": row["label"], "passages": row["docs"]} for row in read(data / "alce_citation_sft/train.jsonl")
    ]
    questions = sorted({row["question"] for row in alce})
    held = {*random.Random(7).sample(questions, 12)}
    expert = {
        split: [row | {"passages": row["docs"]} for row in read(data / f"expertqa_cited/{split}.jsonl")]
        for split in ("train", "validation")
    }
    nq = {split: [*nq_rows(read(data / f"nq_passages/{split}.jsonl"), 0)] for split in ("train", "validation")}
    sets = {
        "train": {
            "alce": [row for row in alce if row["question"] not in held],
            "expertqa": expert["train"],
            "nq": nq["train"],
        },
        "evaluation": {
            "alce": [row for row in alce if row["question"] in held and not row["augmented"]],
            "expertqa": expert["validation"],
            "nq": nq["validation"][:20],
        },
    }
    made: dict[str, list[Row]] = {}
    reports = []
    for split, kinds in sets.items():
        made[split] = []
        for kind, given in kinds.items():
            usable = [row for row in given if short(row)]
            dataset, report = build_citation_dataset(usable, passages=PASSAGES, out_of_range="repair", seed=seed)
            reports.append(
                f"{split}, {kind} ({len(given) - len(usable)} of {len(given)} left out as too long):\n{report}\n"
            )
            made[split] += [
                {"kind": kind, "id": f"{kind}-{row['row']}", "gold": usable[row["row"]].get("gold", []), **row}
                for row in dataset
            ]
    return made["train"], made["evaluation"], "\n".join(reports)
