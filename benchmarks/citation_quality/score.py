"""Scores of the answers that run.py made, with a judge of support, as results.json and a table.

    PYTHONPATH=. python benchmarks/citation_quality/score.py --data DATA --judge JUDGE

JUDGE is a folder that examples/train_entailment.py made, so the scores compare these runs and no others.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from tasks import rows

from peft_dynamic.trainers import evaluate_citations

HERE = Path(__file__).parent
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--judge", required=True)
    parser.add_argument("--answers", type=Path, default=HERE / "answers.jsonl")
    parser.add_argument("--cache", type=Path, default=Path("judged.jsonl"), help="not kept: what the judge has said")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train_rows, questions, report = rows(arguments.data)
    by_id = {row["id"]: row for row in questions}
    runs = [json.loads(line) for line in arguments.answers.open()]
    made = []
    for run in runs:
        own = {key: value for key, value in run.items() if key not in ("answers", "train")}
        own |= {key: value for key, value in run.get("train", {}).items() if key != "losses"}
        made.append({**own, "questions": len(run["answers"]), **scores(run, by_id, arguments.judge, arguments.cache)})
    table = [f"| model | training | seeds | {' | '.join(COLUMNS)} |", "|---|---|---:|" + "---:|" * len(COLUMNS)]
    for model in ("decoder", "fid"):
        for trained in (False, True):
            group = [one for one in made if one["model"] == model and (one["seed"] is not None) == trained]
            if not group:
                continue
            cells = []
            for name in COLUMNS:
                values = [one[name] for one in group]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            table.append(f"| {model} | {'after' if trained else 'before'} | {len(group)} | {' | '.join(cells)} |")
    text = "\n".join(table)
    result = {"runs": made, "train_rows": len(train_rows), "data": report.splitlines(), "table": table}
    (HERE / "results.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(text)


if __name__ == "__main__":
    main()
