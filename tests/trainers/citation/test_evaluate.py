"""ALCE's scores, worked out by hand; what may never change them; bad input; the report."""

import json
import random
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_dynamic.citations import metrics
from peft_dynamic.citations.evaluate import evaluate_citations


def letters(premises: Sequence[str], hypotheses: Sequence[str]) -> list[bool]:
    """A judge: "Needs a b." is supported by a premise that has both letters as words."""
    return [
        set(hypothesis.split("Needs")[1].strip(" .").split()) <= set(premise.split())
        for premise, hypothesis in zip(premises, hypotheses, strict=True)
    ]


def at_stops(text: str) -> list[str]:
    return re.findall(r"[^.]+\.", text)


def scored(outputs: list[str], passages: list[Any], **options: Any) -> Any:
    rows = [{"question": "Q?", "output": output, "passages": passages} for output in outputs]
    return evaluate_citations(rows, letters, splitter=at_stops, progress=False, **options)


GOLDEN = (
    "Needs a [1]. Needs a b [1][2]. Needs a [1][3]. Needs b [1]. Needs c. Needs c [9]. Needs a b [4][2][3][1].\n"
    "Needs a [1]."
)
LETTERS = ["a", "b", "c", "a b"]


def test_an_answer_by_hand() -> None:
    found = scored([GOLDEN], LETTERS)
    sentences = found.answers[0].sentences
    # The second line is not evaluated. Of the first, sentences 1, 2, 3 and 7 are supported by what they cite.
    assert [sentence.supported for sentence in sentences] == [True, True, True, False, False, False, True]
    # 2: neither [1] nor [2] alone will do, nor the other alone. 3: [1] does it, [3] adds nothing. 4: not supported.
    # 6: [9] does not exist, and counts for nothing. 7: [4][2][3] count, and of these [4] does it alone.
    needed = [[True], [True, True], [True, False], [False], [], [], [True, False, False]]
    assert [sentence.needed for sentence in sentences] == needed
    assert [sentence.counted for sentence in sentences] == [[1], [1, 2], [1, 3], [1], [], [], [4, 2, 3]]
    assert found.citation_recall == pytest.approx(100 * 4 / 7)
    assert found.citation_precision == pytest.approx(100 * 5 / 9)
    assert found["valid_citations"] == 0  # for the [9]
    assert found["cited_sentences"] == pytest.approx(100 * 6 / 7)
    assert found["length"] == 16  # words of the first line, without the marks
    assert (found.counts["citations"], found.counts["citations_counted"]) == (11, 9)


def test_means_over_answers_as_alce_takes_them() -> None:
    outputs = [GOLDEN, "", " \nNeeds a [1].", "Needs a b [1][1]. Needs a [1]."]
    # The second and the third have no sentence in their first line, but " \n" is stripped first: recall 1, precision 1.
    # The fourth: recall 1/2; three citations are counted, of which the last is needed.
    found = scored(outputs, LETTERS)
    assert found.citation_recall == pytest.approx(100 * (4 / 7 + 1 + 1 / 2) / 3)
    assert found.citation_precision == pytest.approx(100 * (5 / 9 + 1 + 1 / 3) / 3)
    assert "citation_recall" not in found.answers[1].scores
    assert any(note.startswith("1 of 4 answers are empty; they are not in the means") for note in found.notes)
    zeros = scored(outputs, LETTERS, empty_answers="zero")
    assert zeros.citation_recall == pytest.approx(100 * (4 / 7 + 1 + 1 / 2) / 4)
    assert zeros.citation_precision == pytest.approx(100 * (5 / 9 + 1 + 1 / 3) / 4)
    assert any("empty=zero" in name for name in zeros.scores)
    assert scored(["", "\n"], LETTERS).citation_recall == 0


def test_a_citation_that_supports_alone_counts_though_another_does_too() -> None:
    # "needed" is: alone it entails, or without it nothing does.
    found = scored(["Needs a [1][4]."], LETTERS)
    assert (found.citation_recall, found.citation_precision) == (100, 100)


def test_a_citation_given_twice_counts_twice() -> None:
    assert scored(["Needs a [1][1]. Needs b [1]."], LETTERS).citation_precision == pytest.approx(100 * 2 / 3)
    # Without one of the two [1]s there is still the other.
    assert scored(["Needs a b [1][1][2]."], LETTERS).citation_precision == pytest.approx(100 * 1 / 3)


def test_citations_out_of_range_leave_the_denominator_as_in_alce() -> None:
    # So they may raise precision, where an irrelevant passage that exists never does.
    assert scored(["Needs a [1]. Needs b [1]."], LETTERS).citation_precision == 50
    found = scored(["Needs a [1]. Needs b [1][9]."], LETTERS)
    assert (found.citation_precision, found.citation_recall) == (100, 50)
    assert any("cite out of range" in note for note in found.notes)
    assert scored(["Needs a [0]."], LETTERS).answers[0].sentences[0].out_of_range


def test_a_judge_that_is_not_monotone() -> None:
    said = {("A\nB", "S."): 1, ("A", "S."): 0, ("B", "S."): 0}
    asked = []

    def judge(premises: Sequence[str], hypotheses: Sequence[str]) -> list[int]:
        asked.extend(zip(premises, hypotheses, strict=True))
        return [said[pair] for pair in zip(premises, hypotheses, strict=True)]

    rows = [{"question": "", "output": "S [1][2].", "docs": ["A", "B"]}] * 2
    found = evaluate_citations(rows, judge, splitter=at_stops, progress=False)
    assert (found.citation_recall, found.citation_precision) == (100, 100)
    assert asked == [("A\nB", "S."), ("A", "S."), ("B", "S.")]  # each once, though two rows and two rounds ask
    said[("B", "S.")] = 1
    found = evaluate_citations(rows, judge, splitter=at_stops, progress=False)
    assert (found.citation_recall, found.citation_precision) == (100, 50)


def test_max_citations() -> None:
    outputs = ["Needs c [1][2][4][3]."]
    assert scored(outputs, LETTERS).citation_recall == 0
    found = scored(outputs, LETTERS, max_citations=None)
    assert found.scores["citation_recall[judge=letters, sentences=given, max_citations=None]"] == 100
    assert found.citation_precision == 25


def test_premises_have_titles_and_passages_their_index() -> None:
    premises: list[str] = []

    def judge(given: Sequence[str], hypotheses: Sequence[str]) -> list[float]:
        premises.extend(given)
        return [0.5] * len(given)

    docs = [{"index": "4", "title": "T", "text": "x", "url": "u"}, {"index": 2, "text": "y"}]
    rows = [{"question": "Q", "output": "S [2][4]. R [1].", "docs": docs}]
    found = evaluate_citations(rows, judge, splitter=at_stops, progress=False)
    assert premises == ["y\nTitle: T\nx", "y", "Title: T\nx"]
    assert found.answers[0].sentences[0].supported  # 0.5 is support
    assert found.answers[0].sentences[1].out_of_range


def test_qampari_by_hand() -> None:
    rows = [
        {
            "question": "Which?",
            "output": "Foo [1], The Bar! [2], Needs c [3].",
            "docs": ["x", "y", "c"],
            "answers": [["foo", "f"], ["bar"], *([name] for name in "uvwxy")],
        }
    ]
    premises: list[tuple[str, str]] = []

    def judge(given: Sequence[str], hypotheses: Sequence[str]) -> list[bool]:
        premises.extend(zip(given, hypotheses, strict=True))
        return [premise == "c" for premise in given]

    found = evaluate_citations(rows, judge, task="qampari", progress=False)
    # 2 of 3 items are right, 2 of 7 answers are found, and of five that is 2.
    assert found["qampari_precision"] == pytest.approx(200 / 3)
    assert found["qampari_recall"] == pytest.approx(200 / 7)
    assert found["qampari_recall_5"] == pytest.approx(40)
    assert found["qampari_f1"] == pytest.approx(100 * 2 * (2 / 3) * (2 / 7) / (2 / 3 + 2 / 7))
    assert found["qampari_f1_5"] == pytest.approx(50)
    assert premises == [("x", "Which? Foo"), ("y", "Which? The Bar!"), ("c", "Which? Needs c")]
    assert found.citation_recall == found.citation_precision == pytest.approx(100 / 3)
    # An empty list is one item without a citation.
    empty = evaluate_citations([rows[0] | {"output": ""}], judge, task="qampari", progress=False)
    assert (empty.citation_recall, empty["qampari_f1"], empty.counts["empty_answers"]) == (0, 0, 0)


def test_correctness_by_hand() -> None:
    def contains(premises: Sequence[str], hypotheses: Sequence[str]) -> list[bool]:
        return [hypothesis in premise for premise, hypothesis in zip(premises, hypotheses, strict=True)]

    row = {"question": "Q", "output": "The U.S. army [1] came in 1944 [2].", "docs": ["x", "y"]}
    pairs = [{"short_answers": ["nobody", "a US Army"]}, {"short_answers": ["1945"]}]
    rows = [
        row | {"qa_pairs": pairs, "claims": ["army came in 1944", "navy", "1945"]},
        row | {"qa_pairs": pairs[:1], "claims": ["came"]},
    ]
    found = evaluate_citations(rows, contains, rouge=False, progress=False)
    assert (found["str_em"], found["str_hit"]) == (75, 50)
    assert found["claim_recall"] == pytest.approx(100 * (1 / 3 + 1) / 2)  # the output is read without its marks
    assert "claim_recall[judge=contains]" in found.scores
    one = [row | {"answers": ["nobody", "1944"]}]  # names of one answer
    assert evaluate_citations(one, None, progress=False)["str_em"] == 100
    two = [row | {"answers": [["nobody"], ["1944"]]}]  # two answers
    found = evaluate_citations(two, None, progress=False)
    assert found["str_em"] == 50
    assert not any(name.startswith("citation") for name in found.scores)


def test_rouge_by_hand() -> None:
    pytest.importorskip("rouge_score")
    row = {"question": "Q", "output": "The cats sat [1].", "passages": ["x"], "answer": "A cat sat [1] on the mat."}
    # Stemmed, the longest common subsequence is "cat sat": precision 2/3, recall 2/6.
    found = evaluate_citations([row], None, progress=False)
    assert found["rougeLsum"] == pytest.approx(100 * 2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6))
    annotations = [{"long_answer": "Dogs."}, {"long_answer": "The cat sat there."}]
    # Of several references the best one counts: precision 3/3, recall 3/4.
    found = evaluate_citations([row | {"annotations": annotations}], None, rouge=True, progress=False)
    assert found["rougeLsum"] == pytest.approx(100 * 2 * 0.75 / 1.75)


def test_without_what_scores_need(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    row = {"question": "Q", "output": "S.", "passages": ["x"], "answer": "S."}
    for name in ("rouge_score", "rouge_score.rouge_scorer", "mauve", "punkt", "nltk"):
        monkeypatch.setitem(sys.modules, name, None)
    metrics._rouge_scorer.cache_clear()
    metrics.sentence_splitter.cache_clear()
    try:
        found = evaluate_citations([row], letters, progress=False)
        assert "rougeLsum" not in found.scores
        assert any("it needs rouge-score" in note for note in found.notes)
        assert "citation_recall[judge=letters, sentences=own]" in found.scores
        with pytest.raises(ImportError, match=r"pip install '\.\[citation\]'"):
            evaluate_citations([row], None, rouge=True, progress=False)
        with pytest.raises(ImportError, match=r"pip install '\.\[mauve\]'"):
            evaluate_citations([row], None, rouge=False, mauve=True, progress=False)
    finally:
        metrics.sentence_splitter.cache_clear()


def test_mauve_gets_what_alce_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(metrics, "mauve", lambda *arguments: given.append(arguments) or 0.25)
    words = " ".join(f"w{i}" for i in range(200))
    row = {"question": "Q?", "output": f"So [1].\n{words}", "passages": ["x"], "answer": words + "!"}
    found = evaluate_citations([row], None, rouge=False, mauve=True, progress=False)
    assert found.scores["mauve"] == 25
    references, outputs, model, _ = given[0]
    assert references == ["Q? " + " ".join(f"w{i}" for i in range(99))]
    assert (outputs, model) == (["Q? So"], "gpt2-large")
    assert "mauve[features=gpt2]" in evaluate_citations([row], None, rouge=False, mauve="x/gpt2", progress=False).scores


def test_sentences_are_nltks() -> None:
    pytest.importorskip("punkt")
    name, split = metrics.sentence_splitter()
    assert name == "punkt"
    # What NLTK 3.10 with its punkt_tab model makes of them.
    assert split("It rained in the U.S. on Jan. 5 [1]. Dr. Who came [2].") == [
        "It rained in the U.S. on Jan. 5 [1].",
        "Dr. Who came [2].",
    ]
    assert split("So it is. [1] Then e.g. one.") == ["So it is.", "[1] Then e.g.", "one."]
    assert split("") == []


def test_alces_marks() -> None:
    assert metrics.cited("A [1][2], [12], b [3, 4] (5) [0] [x] [7") == [1, 2, 12, 3, 0, 7]
    assert metrics.without_citations("A [1][2], b | [3, 4] c[5].") == "A, b, 4 c."
    assert metrics.evaluated_part(" \n one<|im_end|> [1] \ntwo") == "one [1] "
    assert metrics.normalised("The  U.S. an-d A  cat!") == "us and cat"


def test_marks_of_other_styles() -> None:
    outputs = ["Needs a b [1, 2].", "Needs a (1).", "Needs abc. [1]"]
    plain = scored(outputs, ["a abc", "b"])
    assert plain.citation_recall == 0
    assert any(note.startswith("2 of 3 answers cite in a style") for note in plain.notes)
    found = scored(outputs, ["a abc", "b"], normalise=True)
    assert (found.citation_recall, found.citation_precision) == (100, 100)
    assert any("marks=normalised" in name for name in found.scores)


# Each sentence needs some letters and cites some passages, each of which has some letters; "" has none.
SETS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=3, unique=True)
PASSAGES = st.lists(SETS.map(" ".join), min_size=1, max_size=5).map(lambda passages: ["", *passages])
SENTENCES = st.lists(
    st.tuples(SETS.filter(len), st.lists(st.integers(1, 6), max_size=4, unique=True)), min_size=1, max_size=4
)


def written(sentences: list[tuple[list[str], list[int]]]) -> str:
    return " ".join(
        f"Needs {' '.join(needs)}" + (" " if ids else "") + "".join(f"[{i}]" for i in ids) + "."
        for needs, ids in sentences
    )


@given(PASSAGES, SENTENCES, st.data())
def test_an_irrelevant_citation_never_raises_precision(passages: list[str], sentences: list[Any], data: Any) -> None:
    sentences = [(needs, [i for i in ids if 1 < i <= len(passages)]) for needs, ids in sentences]
    before = scored([written(sentences)], passages, max_citations=None)
    which = data.draw(st.integers(0, len(sentences) - 1))
    place = data.draw(st.integers(0, len(sentences[which][1])))
    ids = [*sentences[which][1]]
    sentences[which] = (sentences[which][0], [*ids[:place], 1, *ids[place:]])  # the first passage has no letter
    after = scored([written(sentences)], passages, max_citations=None)
    assert after.citation_precision <= before.citation_precision + 1e-9
    assert after.citation_recall == pytest.approx(before.citation_recall)


def test_but_it_may_push_one_out_of_the_three_that_count_as_in_alce() -> None:
    passages = ["", "a", "a", "b"]
    # [2] and [3] say the same, so that only [4] is needed.
    assert scored(["Needs a b [2][4][3]."], passages).citation_precision == pytest.approx(100 * 1 / 3)
    # With [1] in front [3] is not looked at, and [2] is needed too.
    assert scored(["Needs a b [1][2][4][3]."], passages).citation_precision == pytest.approx(100 * 2 / 3)


@given(PASSAGES, SENTENCES, st.randoms())
def test_the_order_of_citations_is_irrelevant(passages: list[str], sentences: list[Any], rng: random.Random) -> None:
    sentences = [(needs, ids[:3]) for needs, ids in sentences]  # of more than three the first three count
    shuffled = [(needs, rng.sample(ids, len(ids))) for needs, ids in sentences]
    one, other = (scored([written(version)], passages) for version in (sentences, shuffled))
    assert one.scores == other.scores


@given(PASSAGES, st.lists(SENTENCES, min_size=1, max_size=3))
def test_scores_are_in_range(passages: list[str], answers: list[Any]) -> None:
    found = scored([written(sentences) for sentences in answers], passages)
    assert all(0 <= value <= 100 for name, value in found.scores.items() if name != "length")
    assert all(0 <= value <= 1 for answer in found.answers for name, value in answer.scores.items() if name != "length")


@given(PASSAGES, SENTENCES)
def test_no_citation_gives_nothing(passages: list[str], sentences: list[Any]) -> None:
    found = scored([written([(needs, []) for needs, _ in sentences])], passages)
    assert (found.citation_recall, found.citation_precision, found["valid_citations"]) == (0, 0, 0)


ROW = {"question": "Q", "output": "S [1].", "passages": ["x"]}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "rows is empty"),
        (["text"], {}, r"rows\[0\] is a str"),
        (
            [{"output": "", "passages": []}],
            {},
            r"rows\[0\]: `question` must be a text, and is missing; the row has output",
        ),
        ([ROW, ROW | {"output": None}], {}, r"rows\[1\]: `output` must be a text, and is a NoneType"),
        ([{"question": "", "output": ""}], {}, r"`passages` \(or `docs`\) must be a list, and is NoneType"),
        ([ROW | {"passages": "x"}], {}, "must be a list, and is str"),
        (
            [ROW | {"passages": [{"title": "T"}]}],
            {},
            r"rows\[0\]: passages\[0\] must be a text or a mapping with a `text`",
        ),
        ([ROW | {"passages": [{"text": "x", "title": 3}]}], {}, "`title` must be a text, and is 3"),
        (
            [ROW | {"passages": [{"text": "x", "index": "one"}]}],
            {},
            "whole number from 1, as it is cited, and is 'one'",
        ),
        ([ROW | {"passages": [{"text": "x", "index": 1}, "y"]}], {}, "the first without is 1"),
        ([ROW | {"passages": [{"text": "x", "index": 1}, {"text": "y", "index": "1"}]}], {}, r"they are \[1, 1\]"),
        ([ROW | {"answers": []}], {}, r"`answers` must have at least one short answer .* and is \[\]"),
        ([ROW | {"answers": "x"}], {}, "`answers` must have at least one short answer"),
        ([ROW | {"answers": [["x"], []]}], {}, "`answers` must have at least one short answer"),
        ([ROW | {"qa_pairs": [{"question": "x"}]}], {}, "`qa_pairs` must have at least one short answer"),
        ([ROW | {"claims": []}], {}, "`claims` must be a list of at least one text"),
        ([ROW | {"answer": ["x"]}], {}, "`answer`, and `long_answer` of each of `annotations`, must be a text"),
        ([ROW, ROW | {"claims": ["x"]}, ROW], {}, r"2 of 3 rows lack `claims`, the first of them rows\[0\]"),
        ([ROW], {"task": "asqa"}, "task='asqa'; it must be 'long_form' or 'qampari'"),
        ([ROW], {"max_citations": 0}, "max_citations=0"),
        ([ROW], {"empty_answers": "drop"}, "empty_answers='drop'"),
        ([ROW], {"mauve": True}, "mauve is asked for, but the rows have no long answer"),
        ([ROW], {"rouge": True}, "rouge is asked for, but the rows have no long answer"),
    ],
)
def test_bad_input(rows: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_citations(rows, None, **options, progress=False)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (3, "entailment is a int; it must be"),
        (lambda premises, hypotheses: [], "gave 0 answers for 1 pairs"),
        (lambda premises, hypotheses: [2], "answered 2; it must be a truth value or a number from 0 to 1"),
        (lambda premises, hypotheses: ["yes"], "answered 'yes'"),
    ],
)
def test_bad_judges(judge: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_citations([ROW], judge, progress=False)


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_reports_show_each_sentence_and_escape_it(tmp_path: Path) -> None:
    passages = [{"title": "<b>T</b>", "text": "a & <i>"}, {"text": "b"}]
    rows = [
        {
            "question": "<script>Q</script>",
            "output": "Needs a [1][2]. Needs <u> [1]. Needs a. Needs a [7].",
            "passages": passages,
        }
    ]
    rows.append({"question": "Empty?", "output": "", "passages": []})
    found = evaluate_citations(rows, letters, splitter=at_stops, progress=False)
    found.report(tmp_path / "r.html")
    page = Text()
    page.feed((tmp_path / "r.html").read_text())
    assert not {"script", "i", "u"} & set(page.tags)
    assert page.tags.count("li") == 4
    for text in ("1. <script>Q</script>", "Needs <u>.", "a & <i>", "citation_recall[judge=letters, sentences=given]"):
        assert any(text in shown for shown in page.texts), text
    for mark in ("[1] needed", "[2] not needed", "[1] does not support it", "[7] no such passage", "no citation"):
        assert page.texts.count(mark) == 1, mark
    assert "supported (1.00)" in page.texts
    assert "(empty answer)" in page.texts
    found.report(tmp_path / "r.md")
    shown = (tmp_path / "r.md").read_text()
    assert r"## 1. \<script\>Q\</script\>" in shown
    assert "- Needs a.\n  - **supported: \\[1\\] needed; \\[2\\] not needed**" in shown
    with pytest.raises(ValueError, match=r"must end in .html or .md, and this one ends in '.pdf'"):
        found.report(tmp_path / "r.pdf")


def test_json_has_all_of_it(tmp_path: Path) -> None:
    found = scored([GOLDEN], LETTERS)
    found.to_json(tmp_path / "scores.json")
    read = json.loads((tmp_path / "scores.json").read_text())
    assert read["scores"] == found.scores
    assert read["answers"][0]["sentences"][1]["needed"] == [True, True]
    assert "| citation_recall[judge=letters, sentences=given] | 57.1 |" in found.table()
    with pytest.raises(KeyError, match="no score 'recall'; there are length, citation_recall"):
        found["recall"]
