"""build_citation_dataset: citations keep their passage, and every row that changes or goes is counted."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_dynamic.citations.rows import read_rows
from peft_dynamic.citations.text import find_citations, strip_citations
from peft_dynamic.trainers.citation.data import build_citation_dataset


def row(answer: str, count: int = 3, question: str = "Why?", **more: Any) -> dict[str, Any]:
    passages = [{"title": f"T{i}", "text": f"{question} passage {i}"} for i in range(1, count + 1)]
    return {"question": question, "passages": passages, "answer": answer, **more}


def pointed_at(made: dict[str, Any]) -> list[str]:
    """The text that each citation of an answer points to."""
    return [made["passages"][i - 1]["text"] for _, _, ids in find_citations(made["answer"]) for i in ids]


RUNS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True), min_size=1, max_size=4)


@given(RUNS, st.integers(0, 10**6), st.integers(5, 9))
def test_a_citation_points_to_the_same_passage_after_shuffling_and_filling_up(
    runs: list[list[int]], seed: int, wanted: int
) -> None:
    answer = " ".join("Word " + "".join(f"[{i}]" for i in run) + "." for run in runs)
    rows = [row(answer, 5), row("Other [1].", 5, "What?")]
    dataset, report = build_citation_dataset(rows, passages=wanted, seed=seed)
    made = dataset[0]
    assert pointed_at(made) == [f"Why? passage {i}" for run in runs for i in run]
    assert len(made["passages"]) == wanted == len({p["text"] for p in made["passages"]})
    assert made["cited"] == sorted({made["origin"].index(i) + 1 for run in runs for i in run})
    for passage, index in zip(made["passages"], made["origin"], strict=True):
        assert passage["text"].startswith("What?" if index == 0 else f"Why? passage {index}")
    # and once more, with the pool's passages taken away
    back = {"question": "Why?", "answer": made["answer"]}
    back["passages"] = [{**p, "index": i} for i, p in enumerate(made["passages"], 1) if made["origin"][i - 1]]
    unshuffled, _ = build_citation_dataset([back], passages=None, shuffle=False)
    assert pointed_at(unshuffled[0]) == pointed_at({**rows[0], "answer": answer})
    assert report.kept == 2
    assert not report.dropped


def test_shuffling_moves_and_is_seeded() -> None:
    rows = [row("Word [1].", 5, f"Q{i}?") for i in range(40)]
    first, again, other = (build_citation_dataset(rows, seed=seed)[0] for seed in (0, 0, 1))
    assert first.to_list() == again.to_list()
    assert first["origin"] != other["origin"]
    assert {made[0] for made in first["cited"]} == {1, 2, 3, 4, 5}
    # A row's draw does not depend on those before it.
    later, _ = build_citation_dataset([row("no mark"), *rows[1:]], seed=0)
    assert later["origin"] == first["origin"][1:]
    kept, _ = build_citation_dataset(rows, shuffle=False)
    assert kept["origin"] == [[1, 2, 3, 4, 5]] * 40


def test_every_row_is_counted_with_its_reason() -> None:
    rows = [
        row("Fine [1, 2]."),
        row("Beyond [4]."),
        row(""),
        row("Fine (1).", question=" "),
        row("Fine [1].", 0),
        row("No mark."),
        row("Fine [1, 2]."),
        row("Fine [1].") | {"passages": ["", "  "]},
        row("So ［1］. [2] `a[9]` Next", question="Code?"),
        row("Equal [1][3].") | {"passages": ["same", "other", "same"]},
        row("None") | {"answer": None},
    ]
    dataset, report = build_citation_dataset(rows, passages=None, shuffle=False)
    assert report.dropped == {
        "cites an id that no passage has": [1],
        "empty answer": [2, 10],
        "no question": [3],
        "no passages": [4],
        "cites nothing": [5],
        "duplicate of an earlier row": [6],
        "all passages are empty": [7],
    }
    assert report.repaired == {
        "citation marks rewritten": [0, 8],
        "citation marks within code or URLs left alone": [8],
        "equal passages made one": [9],
    }
    assert (report.rows, report.kept) == (11, 3)
    assert dataset["row"] == [0, 8, 9]
    assert dataset["answer"] == ["Fine [1][2].", "So [1][2]. `a[9]` Next", "Equal [1]."]
    assert "| dropped: empty answer | 2 |" in str(report)
    assert report.rows == report.kept + sum(len(rows) for rows in report.dropped.values())


def test_ids_beyond_the_passages_can_be_repaired() -> None:
    rows = [row("So [1][7]. Then [9]."), row("Only [9].", question="What?"), row("Zero [0] and [2].", question="Zero?")]
    dataset, report = build_citation_dataset(rows, passages=None, shuffle=False, out_of_range="repair")
    assert dataset["answer"] == ["So [1]. Then.", "Zero and [2]."]
    assert report.dropped == {"cites only ids that no passage has": [1]}
    assert report.repaired == {"ids that no passage has taken away": [0, 2]}


def test_uncited_answers_can_be_kept() -> None:
    dataset, report = build_citation_dataset([row("No mark.")], passages=None, uncited="keep")
    assert dataset["cited"] == [[]]
    assert report.repaired == {"cites nothing": [0]}
    # An answer that lost all its marks is another thing: what it says came from sources that do not exist.
    rows = [row("No mark."), row("Only [9].", question="What?")]
    dataset, report = build_citation_dataset(rows, passages=None, uncited="keep", out_of_range="repair")
    assert dataset["row"] == [0]
    assert report.dropped == {"cites only ids that no passage has": [1]}


def test_more_passages_than_wanted_lose_the_uncited_ones() -> None:
    rows = [row("So [4][6].", 6), row("All [1][2][3][4].", 4, "What?"), row("First [1].", 6, "Who?")]
    dataset, report = build_citation_dataset(rows, passages=3, shuffle=False)
    assert dataset["origin"] == [[1, 4, 6], [1, 2, 3]]
    assert dataset["answer"] == ["So [2][3].", "First [1]."]
    assert report.dropped == {"cites more than 3 passages": [1]}


def test_the_same_text_under_another_title_is_another_passage() -> None:
    passages = [{"title": "Paris", "text": "A city."}, {"title": "Rome", "text": "A city."}]
    rows = [row("Rome is one [2].") | {"passages": passages}]
    dataset, report = build_citation_dataset(rows, passages=None, shuffle=False)
    assert dataset["answer"] == ["Rome is one [2]."]
    assert dataset["passages"] == [passages]
    assert not report.repaired


def test_a_row_in_another_order_is_the_same_row() -> None:
    turned = row("So [3].") | {"passages": row("")["passages"][::-1]}
    for shuffle in (True, False):
        dataset, report = build_citation_dataset([row("So [1]."), turned], passages=None, shuffle=shuffle)
        assert dataset["row"] == [0]
        assert report.dropped == {"duplicate of an earlier row": [1]}


def test_index_says_what_an_id_means() -> None:
    passages = [{"text": "third", "index": 3}, {"text": "first", "index": 1}]
    rows = [{"question": "Why?", "passages": passages, "answer": "So [3]. And [1]."}]
    dataset, _ = build_citation_dataset(rows, passages=None, seed=1)
    assert pointed_at(dataset[0]) == ["third", "first"]
    assert sorted(dataset["origin"][0]) == [1, 3]


def test_the_pool() -> None:
    rows = [row("So [1].", 1), row("So [1].", 1) | {"passages": ["extra"]}]
    dataset, report = build_citation_dataset(rows, passages=2, pool=["extra", "extra", ""])
    assert [sorted(p["text"] for p in made) for made in dataset["passages"]] == [["Why? passage 1", "extra"]]
    assert report.dropped == {"the pool has too few other passages to fill up with": [1]}
    # Passages of the same question are not irrelevant, whichever row they come from.
    rows = [row("So [1].", 1), row("Thus [1].") | {"passages": ["close to it"]}, row("So [1].", 1, "What?")]
    dataset, report = build_citation_dataset(rows, passages=2)
    assert all("What? passage 1" in [p["text"] for p in made["passages"]] for made in dataset.select([0, 1]))


def test_columns_have_names_of_their_own() -> None:
    rows = [{"q": "Why?", "docs": ["a", "b"], "label": "So [2]."}]
    names = {"question": "q", "passages": "docs", "answer": "label"}
    dataset, _ = build_citation_dataset(rows, passages=None, columns=names)
    assert strip_citations(dataset["answer"][0]) == "So."
    assert pointed_at(dataset[0]) == ["b"]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([row("So [1].")], {"passages": 0}, "passages=0"),
        ([row("So [1].")], {"out_of_range": "keep"}, "out_of_range='keep'"),
        ([row("So [1].")], {"uncited": True}, "uncited=True"),
        ([row("So [1].")], {"columns": {"docs": "d"}}, r"columns has the keys \['docs'\]"),
        ([{"question": "Why?", "docs": [], "answer": ""}], {}, "no 'passages'"),
        ([row("So [1].") | {"passages": "one text"}], {}, "pass a list"),
        ([row("So [1].") | {"passages": [{"title": "no text"}]}], {}, "a dict with texts"),
        ([row("So [1].") | {"passages": [{"title": 7, "text": "a"}]}], {}, "a dict with texts"),
        ([row("So [1].") | {"answer": 5}], {}, "have to be texts"),
        ([row("So [1].") | {"passages": [{"text": "a", "index": 0}]}], {}, "numbers from 1"),
        ([row("So [1].") | {"passages": [{"text": "a", "index": 1}, {"text": "b", "index": 1}]}], {}, "numbers from 1"),
        ([row("nothing")], {}, "none of the 1 rows can be used"),
        ([], {}, "none of the 0 rows"),
    ],
)
def test_bad_input(rows: list[Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build_citation_dataset(rows, **arguments)


def test_a_passage_is_read_as_the_scores_read_it() -> None:
    """ALCE's rows have an extract in `sent` beside the whole passage, and its script reads that."""
    listed = [{"title": "One", "text": "All of it.", "sent": "Of it."}, "Two."]
    data, _ = build_citation_dataset([row("So [1].") | {"passages": listed}], passages=None, shuffle=False)
    (read,) = read_rows([{"question": "Q?", "output": "So [1].", "passages": listed}], "long_form")
    assert [passage["text"] for passage in data[0]["passages"]] == ["Of it.", "Two."]
    assert [passage.text for passage in read.passages] == ["Of it.", "Two."]
    assert [passage["title"] for passage in data[0]["passages"]] == ["One", ""]
