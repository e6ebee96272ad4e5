"""What of a row is trained and evaluated on where it is longer than a task's limit, and how a packed file is read."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from benchmarks.tasks import Data, Task, collate, completed, is_asked, read


def test_of_a_row_that_is_cut_what_is_left_of_the_answer_is_in_the_loss() -> None:
    assert completed([1, 2], [3, 4], 4) == {"input_ids": [1, 2, 3, 4], "answer": 2}
    rows = [completed([1, 2, 3], [4, 5, 6, 7], 5), completed([1], [2, 3], 5)]
    labels = collate(rows, 0)["labels"]
    assert torch.equal(labels, torch.tensor([[4, 5], [2, 3]]))
    whole, filled = completed([], [1, 2, 3], 2), completed([1, 2, 3], [4], 3)
    assert whole == {"input_ids": [1, 2], "answer": 2}
    assert is_asked(whole)
    assert not is_asked(filled)


def test_a_packed_file_has_its_lines_ended_by_line_feeds_alone(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read(tmp_path / "train.jsonl") == rows


@pytest.mark.model("smollm2")
def test_a_row_whose_prompt_fills_the_limit_is_neither_trained_nor_evaluated_on(
    tmp_path: Path, model_path: Path
) -> None:
    rows = [{"mr": "name", "ref": "a"}, {"mr": "name " * 40, "ref": "b"}, {"mr": "food", "ref": "c"}]
    (tmp_path / "some").mkdir()
    for file in ("train", "validation"):
        (tmp_path / "some" / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task(model=model_path.name, targets=[], max_length=16, batch_size=2)
    data = Data("some", task, tmp_path, model_path.parent)
    assert [row["answer"] for row in data.train] == [2, 2]  # a letter and the end of text
    assert sum(len(batch["input_ids"]) for batch in data.evaluation) == 2
