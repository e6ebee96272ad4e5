"""Citation marks: what counts as one, and that rewriting them loses nothing."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_dynamic.citations.text import (
    cited_ids,
    find_citations,
    hidden_citations,
    map_citations,
    normalise_citations,
    sentence_citations,
    split_sentences,
    strip_citations,
)

WORDS = ["It", "is", "so", "km²", "10³", "Mr.", "e.g.", "cost", "(1990)", "f(2)", "`a[1]`", "https://x.org/a[2]"]
MARKS = ["[1]", "[2, 3]", "[4][5]", "[1-3]", "(2)", "(1, 4)", "【3】", "［5］", "〔2；1〕", "<sup>3</sup>", "⁴", "²,³"]
SPACES = ["", " ", "  ", ", ", ". ", ".", "? ", "\n", ": ", "; ", '." ']
MESSY = st.lists(st.sampled_from([f" {word}" for word in WORDS] + MARKS + SPACES), max_size=14).map("".join)
# Plain words with marks as normalise_citations writes them, and the ids in their order.
CLEAN = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True), min_size=1, max_size=5)


def clean(runs: list[list[int]]) -> str:
    return " ".join("Word " + "".join(f"[{i}]" for i in run) + "." for run in runs)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("So [1].", [(1,)]),
        ("So [1, 2] and [3; 4] and [5 and 6].", [(1, 2), (3, 4), (5, 6)]),
        ("So [1][2].", [(1,), (2,)]),
        ("So [1-3], [4–5], [6,8-9].", [(1, 2, 3), (4, 5), (6, 8, 9)]),
        ("So 【1】 and ［２］ and 〔3、4〕.", [(1,), (2,), (3, 4)]),
        ("So (1).", [(1,)]),
        ("So (1, 2), and on (3)(4); yes.", [(1, 2), (3,), (4,)]),
        ("The sea¹ and the end.²,³ Next word⁽⁴⁾", [(1,), (2, 3), (4,)]),
        ("So<sup>1, 2</sup>.", [(1, 2)]),
        ("Beyond [0] and [77].", [(0,), (77,)]),
        # not marks
        ("goals (72) [1], (805).", [(1,)]),
        ("Reasons: (1) cost, (2) time and (3) fun.", []),
        ("10³ x² km² mol² (1990) f(1) [a] [] [1a] [5-3] [1-99999]", []),
        ("`a[1]` ``b[2]`` https://x.org/[3] www.y.org/a(1).", []),
        ("```python\na[1]\n``` and <code>b[2]</code>", []),
        ("```\nnever closed [1]", []),
        # a URL ends at the bracket that it did not open; a single tick is no code
        ("See (https://x.org/a_(b))[1] ` [2]", [(1,), (2,)]),
    ],
)
def test_find_citations(text: str, ids: list[tuple[int, ...]]) -> None:
    assert [citation.ids for citation in find_citations(text)] == ids


def test_positions_are_those_of_the_text() -> None:
    text = "A [1, 2] b【3】."
    assert [text[start:end] for start, end, _ in find_citations(text)] == ["[1, 2]", "【3】"]


def test_hidden_citations() -> None:
    assert hidden_citations("`a[1]` b [2] https://x.org/[3]\n```\nc[4] [5, 6]\n```") == 4


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("So [1, 2].", "So [1][2]."),
        ("So [2], [1] [2].", "So [2][1]."),
        ("So it is. [1] Then. [2]", "So it is [1]. Then [2]."),
        ("So it is.[1][2]\nThen.¹", "So it is [1][2].\nThen [1]."),
        ("So it is. [1] says so.", "So it is. [1] says so."),
        ("See e.g. [1] Here.", "See e.g. [1] Here."),
        ('"So." [1] Then', '"So [1]." Then'),
        ("[1] is first.", "[1] is first."),
        ("so (1)(2-3) `a[1]`", "so [1][2][3] `a[1]`"),
        # a line whose marks stand in front
        ("[1] A. [2] B.", "[1] A. [2] B."),
        (
            "[1][2] One thing. [3] Another.\n[4] More! [5, 6] Still",
            "[1][2] One thing. [3] Another.\n[4] More! [5][6] Still",
        ),
        ("[1] One. [2] Two. [3]", "[1] One. [2] Two [3]."),
        ("[1] says so. [2] Then.", "[1] says so [2]. Then."),
        ("So it is. [1] Then.\n[2] A. [3] B.", "So it is [1]. Then.\n[2] A. [3] B."),
        # a sentence that ends twice
        ("Statement. [1]. Next.", "Statement [1]. Next."),
        ("Statement. [1][2].", "Statement [1][2]."),
        ("Really? [1]. Next.", "Really [1]? Next."),
        ('He said "So." [1]. Next.', 'He said "So [1]." Next.'),
        ("So on. [1]... and", "So on. [1]... and"),
        # a URL must not take a mark in, so one that would go into it is left as it is written
        (".²www.![1],", ".²www.![1],"),
        (";³www.(2)", ";[3]www [2]."),
        (" !³www.[1] [ [3]. ", " ![3]www [1]. [ [3]. "),
        ('?³www.…[3]. "\nA] )', '?[3]www [3].… "\nA] )'),
        ("- A.³www.[4-5]--?", "- A.³www.[4][5]--?"),
        ('[1] https://x.org/a[2]." [1]', '[1] https://x.org/a[2] [1]."'),
    ],
)
def test_normalise_citations(text: str, normal: str) -> None:
    assert normalise_citations(text) == normal


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("So [1].", "So."),
        ("So[1] it [2] is [3], [4].", "So it is."),
        ("[1] So.\n[2] Then.", "So.\nThen."),
        ("goals (72)[1].", "goals (72)."),
        ("So `a[1]`.", "So `a[1]`."),
    ],
)
def test_strip_citations(text: str, plain: str) -> None:
    assert strip_citations(text) == plain


def test_sentence_citations() -> None:
    text = "Dr. Who (b. 1963) left the U.S. in May [1]. It rained. [2][3] Then [4] says 3.5 km.¹\nEnd [2, 2]! `x. Y` A"
    assert sentence_citations(text) == [
        ("Dr. Who (b. 1963) left the U.S. in May.", [1]),
        ("It rained.", [2, 3]),
        ("Then says 3.5 km.", [4, 1]),
        ("End!", [2]),
        ("`x. Y` A", []),
    ]


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("1[\n1]", [("1", [1])]),
        ("So [1,\n2]. Then.", [("So.", [1, 2]), ("Then.", [])]),
        ("[1] A. [2] B.", [("A.", [1]), ("B.", [2])]),
        ("[1][2] One. [3] [4] Two!\nThree. [5]", [("One.", [1, 2]), ("Two!", [3, 4]), ("Three.", [5])]),
        ("Statement. [1]. Next.", [("Statement.", [1]), ("Next.", [])]),
        ("Statement. [1][2]. Next? [3].", [("Statement.", [1, 2]), ("Next?", [3])]),
        ("One [1]. [2] says so. Two. [3]", [("One.", [1]), ("says so.", [2]), ("Two.", [3])]),
    ],
)
def test_sentences_and_what_they_cite(text: str, pairs: list[tuple[str, list[int]]]) -> None:
    assert sentence_citations(text) == pairs
    assert [ids for _, ids in sentence_citations(normalise_citations(text))] == [ids for _, ids in pairs]


@given(MESSY)
def test_normalising_twice_changes_nothing_and_keeps_the_ids(text: str) -> None:
    normal = normalise_citations(text)
    assert normalise_citations(normal) == normal
    assert cited_ids(normal) == cited_ids(text)
    assert hidden_citations(normal) == hidden_citations(text)
    assert all(normal[start:end] == f"[{ids[0]}]" and len(ids) == 1 for start, end, ids in find_citations(normal))


@given(MESSY)
def test_nothing_is_left_to_strip_and_no_word_is_lost(text: str) -> None:
    plain = strip_citations(text)
    # What stands in code and in an address, up to the next space, is no citation
    assert not re.search(r"\[\d", re.sub(r"https://\S+|`[^`]*`", "", plain))
    for word in ("km²", "10³", "cost", "`a[1]`", "https://x.org/a[2]"):
        assert plain.count(word) == text.count(word)


@given(MESSY)
def test_sentences_hold_the_whole_text(text: str) -> None:
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


@given(CLEAN, st.permutations(range(1, 10)))
def test_mapping_there_and_back_is_exact(runs: list[list[int]], order: list[int]) -> None:
    text = clean(runs)
    there = {old: new for new, old in enumerate(order, 1)}
    mapped = map_citations(text, there)
    assert [c.ids[0] for c in find_citations(mapped)] == [there[i] for run in runs for i in run]
    assert map_citations(mapped, {new: old for old, new in there.items()}) == text
    assert [ids for _, ids in sentence_citations(text)] == runs
    assert normalise_citations(text) == text
    assert strip_citations(text) == " ".join(["Word."] * len(runs))


PIECES = [
    *"[](),-;:.!?…。`~<>&²³ 12\n\t\"'”abAB",
    "https://x.y/",
    "www.",
    "<sup>",
    "</sup>",
    "[1]",
    "(2)",
    "[3]. ",
    "e.g.",
    " and ",
]


@given(st.one_of(st.text("[(1,2-3)]²³`. \nab", max_size=25), st.lists(st.sampled_from(PIECES)).map("".join), st.text()))
def test_any_text_is_taken(text: str) -> None:
    normal = normalise_citations(text)
    assert normalise_citations(normal) == normal
    assert cited_ids(normal) == cited_ids(text)
    assert {i for _, ids in sentence_citations(text) for i in ids} == {*cited_ids(text)}
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
