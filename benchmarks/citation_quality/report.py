"""The table of results.json, which is made from the answers of runs.jsonl where there is a judge of support.

The judge is a folder that examples/train_entailment.py made, so the scores compare these runs and no others.
"""

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.citation_quality.rows import rows as rows_of
from benchmarks.study import Context, Row
from benchmarks.summary import shown, spread, table
from peft_dynamic.trainers import evaluate_citations

COLUMNS = (
    "valid_citations",
    "citation_recall",
    "citation_precision",
    "cited_sentences",
    "str_em",
    "rougeLsum",
    "length",
)


def scores(run: dict[str, Any], questions: dict[str, dict[str, Any]], judge: str, cache: Path) -> dict[str, float]:
    """Citation scores and ROUGE over all rows, str_em over NQ's, which alone have short answers."""
    said = [{**questions[one["id"]], "output": one["output"]} for one in run["answers"]]
    fields = ("question", "passages", "output", "answer")
    whole = evaluate_citations(
        [{key: row[key] for key in fields} for row in said],
        judge,
        cache=cache,
        normalise=True,
        empty_answers="zero",
        progress=False,
    )
    nq = [{**{key: row[key] for key in fields}, "answers": row["gold"]} for row in said if row["kind"] == "nq"]
    correct = evaluate_citations(nq, None, rouge=False, normalise=True)
    found = {**whole.scores, "str_em": correct["str_em"]}
    return {name: value for name in COLUMNS for key, value in found.items() if key.split(" ")[0].split("[")[0] == name}


def judged(runs: list[Row], context: Context) -> dict[str, Any]:
    torch.set_num_threads(1)
    train_rows, questions, of_data = rows_of(context.paths["data"])
    by_id = {row["id"]: row for row in questions}
    made = []
    for run in runs:
        own = {key: value for key, value in run.items() if key not in ("answers", "train")}
        own |= {key: value for key, value in run.get("train", {}).items() if key != "losses"}
        found = scores(run, by_id, str(context.paths["judge"]), Path(context.settings["cache"]))
        made.append({**own, "questions": len(run["answers"]), **found})
    return {"runs": made, "train_rows": len(train_rows), "data": of_data.splitlines()}


def report(rows: list[Row], context: Context) -> str:
    path = context.folder / "results.json"
    if "judge" in context.paths:
        result = judged(context.study.lines_of(rows), context)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    elif not path.exists():
        return "The answers are scored with --judge."
    made = json.loads(path.read_text(encoding="utf-8"))["runs"]
    lines = []
    for model in ("decoder", "fid"):
        for training in ("before", "after"):
            group = [one for one in made if (one["model"], one["training"]) == (model, training)]
            if group:
                cells = [shown(spread(one[name] for one in group)) for name in COLUMNS]
                lines.append([model, training, len(group), *cells])
    return table(["model", "training", "seeds", *COLUMNS], lines, right=range(2, 3 + len(COLUMNS)))
