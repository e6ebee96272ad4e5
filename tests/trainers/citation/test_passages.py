"""Rows and passages as people have them: one reader for training and for evaluation, so that a mark means one thing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from peft_dynamic.citations.evaluate import evaluate_citations
from peft_dynamic.citations.passages import read_index
from peft_dynamic.trainers.citation.data import build_citation_dataset
from peft_dynamic.trainers.citation.formats import check_row

TEXTS = ["the sea is blue", "the sky is blue", "grass is green"]
NUMBERS = [7, "7", " 7 ", 7.0, np.int64(7), np.int8(7), np.float64(7.0), np.float32(7.0)]


def judge(premises: Sequence[str], hypotheses: Sequence[str]) -> list[bool]:
    return [hypothesis.rstrip(".") in premise for premise, hypothesis in zip(premises, hypotheses, strict=True)]


def row(indices: Sequence[Any], cites: int) -> dict[str, Any]:
    """A row whose second passage is cited by the number that `indices` gives it."""
    passages = [{"text": text, "index": index} for text, index in zip(TEXTS, indices, strict=True)]
    return {"question": "Why?", "passages": passages, "answer": f"the sky is blue [{cites}]."}


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_an_index_means_the_same_in_training_and_in_evaluation(number: Any) -> None:
    given = row([1, number, 3], 7)
    dataset, report = build_citation_dataset([given], passages=None, seed=3)
    (place,) = dataset[0]["cited"]
    assert dataset[0]["passages"][place - 1]["text"] == "the sky is blue"
    assert dataset[0]["answer"] == f"the sky is blue [{place}]."
    assert not report.dropped
    rows = [given | {"output": given["answer"]}]
    scores = evaluate_citations(rows, judge, splitter=lambda text: [text], progress=False).scores
    assert [value for name, value in scores.items() if name.startswith("citation_recall")] == [100]
    built = evaluate_citations(
        [dataset[0] | {"output": dataset[0]["answer"]}], judge, splitter=lambda text: [text], progress=False
    ).scores
    assert [value for name, value in built.items() if name.startswith("citation_recall")] == [100]


@pytest.mark.parametrize(
    "number", [0, -1, 1.5, "x", "", "1.0", True, float("inf"), [1], {}, np.bool_(True), "１"], ids=repr
)
def test_what_is_no_number_is_refused_in_both(number: Any) -> None:
    with pytest.raises(ValueError, match=r"`index` must be a whole number from 1"):
        read_index(number, "here")
    given = row([1, number, 3], 1)
    with pytest.raises(ValueError, match=r"row 0: passages\[1\]: `index` must be a whole number"):
        build_citation_dataset([given], passages=None)
    with pytest.raises(ValueError, match=r"rows\[0\]: passages\[1\]: `index` must be a whole number"):
        evaluate_citations([given | {"output": "x"}], None, progress=False)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_an_index_that_only_some_have_is_refused_in_both(missing: Any) -> None:
    given = row([1, missing, 3], 1)
    with pytest.raises(ValueError, match="only some passages have an `index`, the first without is 1"):
        build_citation_dataset([given], passages=None)
    with pytest.raises(ValueError, match="only some passages have an `index`, the first without is 1"):
        evaluate_citations([given | {"output": "x"}], None, progress=False)


def test_an_index_that_none_has_is_the_place() -> None:
    given = row([None, float("nan"), None], 2)
    dataset, _ = build_citation_dataset([given], passages=None, shuffle=False)
    assert (dataset[0]["answer"], dataset[0]["cited"]) == ("the sky is blue [2].", [2])


def test_a_prompt_counts_by_order_so_other_numbers_are_refused_there() -> None:
    assert check_row(row([1, "2", 3.0], 2))[2] == "the sky is blue [2]."
    with pytest.raises(ValueError, match=r"passages with the `index` \[3, 1, 2\].* Run build_citation_dataset first"):
        check_row(row([3, 1, 2], 1))


@pytest.mark.parametrize("as_arrays", [False, True])
def test_rows_of_pandas(as_arrays: bool, tmp_path: Path) -> None:
    rows = [row([1, 2, 3], 2), row([5, 6, 7], 6) | {"answer": None}, row([1, 2, 3], 2) | {"question": "How?"}]
    frame = pandas.DataFrame(rows)
    if as_arrays:
        frame.to_parquet(tmp_path / "rows.parquet")
        frame = pandas.read_parquet(tmp_path / "rows.parquet")
        assert isinstance(frame["passages"][0], np.ndarray)
    ours, report = build_citation_dataset(frame, passages=None, seed=1)
    theirs, expected = build_citation_dataset(rows, passages=None, seed=1)
    assert (ours.to_list(), report) == (theirs.to_list(), expected)
    assert report.dropped == {"empty answer": [1]}
    frame = frame.drop(index=1).assign(output="the sky is blue [2].").drop(columns="answer")
    scores = evaluate_citations(frame, judge, splitter=lambda text: [text], progress=False).scores
    assert scores["valid_citations"] == 100


@pytest.mark.parametrize("rows", ["a text", {"question": "Why?"}, 3, None])
def test_what_are_no_rows_is_refused(rows: Any) -> None:
    with pytest.raises(TypeError, match="rows is a"):
        build_citation_dataset(rows)
    with pytest.raises(TypeError, match="rows is a"):
        evaluate_citations(rows, None)


@pytest.mark.parametrize("field", ["question", "answer", "text", "title"])
def test_half_a_character_is_reported_by_row(field: str) -> None:
    broken = row([1, 2, 3], 2)
    if field in broken:
        broken[field] += " \ud83d"
    else:
        broken["passages"][0] |= {field: "x \ud83d"}
    dataset, report = build_citation_dataset([row([1, 2, 3], 2), broken], passages=None)
    assert report.dropped == {"holds half a character (a lone surrogate)": [1]}
    json.dumps(dataset.to_list(), ensure_ascii=False).encode()


@pytest.mark.parametrize("field", ["question", "output"])
def test_half_a_character_is_refused_in_an_evaluation(field: str) -> None:
    given = row([1, 2, 3], 2) | {"output": "x [1]"}
    given[field] += "\udc00"
    with pytest.raises(ValueError, match=rf"rows\[0\]: `{field}` holds half a character"):
        evaluate_citations([given], None)


def test_an_evaluation_says_that_it_reads_the_first_line() -> None:
    one, two = "the sky is blue [2].", "the sky is blue [2].\n\nMore [1]."
    rows = [row([1, 2, 3], 2) | {"output": output} for output in (one, two, f"{one}\n")]
    found = evaluate_citations(rows, judge, splitter=lambda text: [text], progress=False)
    assert [note for note in found.notes if "first line" in note] == [
        "1 of 3 outputs go on after their first line. As in ALCE the first line alone is scored; join the lines with "
        "spaces before to have all of it scored."
    ]
    assert "first line" in found.table()
    found = evaluate_citations(rows[::2], judge, splitter=lambda text: [text], progress=False)
    assert not [note for note in found.notes if "first line" in note]
