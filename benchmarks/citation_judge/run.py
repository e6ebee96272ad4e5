"""What a judge of examples/train_entailment.py is worth for `evaluate_citations`.

The judge is what the example has written: `scores.json` for its validation rows, and the model. The model is used on
data that it was not trained on, cited answers that people found right (alce_citation_sft, without its augmentations):
their citations as they are, each replaced by another passage of the same question, and with the passages of another
question.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import Cell, Context, Row
from benchmarks.summary import table
from benchmarks.tasks import read
from peft_dynamic.citations.entailment import EntailmentCache, EntailmentModel
from peft_dynamic.citations.evaluate import evaluate_citations

SEEDS = (0, 1, 2)


def answers(data: Path) -> list[Row]:
    rows = read(data / "alce_citation_sft" / "train.jsonl")
    return [
        {"question": row["question"], "output": row["label"], "passages": row["docs"]}
        for row in rows
        if not row["augmented"]
    ]


def recited(row: Row, rng: random.Random) -> Row:
    """Each citation replaced by one of a passage that its sentence does not cite."""
    passages = {passage["index"] for passage in row["passages"]}

    def other(run: re.Match[str]) -> str:
        cited = [int(i) for i in re.findall(r"\d+", run[0])]
        left = sorted(passages - set(cited))
        return "".join(f"[{i}]" for i in rng.sample(left, min(len(cited), len(left))))

    return row | {"output": re.sub(r"(?:\[\d+\])+", other, row["output"])}


def with_other_passages(rows: list[Row]) -> list[Row]:
    """Each answer with the passages of the next question, of which there must be as many."""
    return [row | {"passages": other["passages"]} for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]


def sanity(judge: EntailmentCache, data: Path) -> Row:
    rows = answers(data)
    versions = {"as written": [rows], "passages of another question": [with_other_passages(rows)]}
    versions["other passages of the question"] = [
        [recited(row, rng) for row in rows] for rng in map(random.Random, SEEDS)
    ]
    found = {}
    for name, each in versions.items():
        evaluations = [evaluate_citations(version, judge, progress=False) for version in each]
        found[name] = {
            "citation_recall": [evaluation.citation_recall for evaluation in evaluations],
            "citation_precision": [evaluation.citation_precision for evaluation in evaluations],
            "sentences": evaluations[0].counts["sentences"],
        }
        print(name, json.dumps(found[name]))
    return found


def run(cell: Cell, context: Context) -> dict[str, Any]:
    folder = context.paths["judge"]
    if cell["part"] == "validation":
        return {"validation": {folder.name: json.loads((folder / "scores.json").read_text(encoding="utf-8"))}}
    model = EntailmentModel(folder / "model", dtype=torch.bfloat16, batch_size=16)
    judge = EntailmentCache(model, Path(context.settings["cache"]) if context.settings["cache"] else None)
    return {"citations": sanity(judge, context.paths["data"])}


def report(record: dict[str, Any], context: Context) -> str:
    scores = [
        [judge, rows, f"{found['auc']:.3f}", f"{found['balanced_accuracy']:.3f}", found["rows"]]
        for judge, sets in record["validation"].items()
        for rows, found in sets.items()
        if "auc" in found
    ]
    cited = []
    for name, found in record.get("citations", {}).items():
        pairs = list(zip(found["citation_recall"], found["citation_precision"], strict=True))
        for draw, pair in enumerate(pairs, 1):
            cited.append([f"{name}, draw {draw}" if len(pairs) > 1 else name, *(f"{value:.1f}" for value in pair)])
    validation = table(["judge", "data", "AUC", "balanced accuracy", "rows"], scores, right=range(2, 5))
    return validation + "\n\n" + table(["citations", "recall", "precision"], cited, right=(1, 2))
