"""From (question, passages, cited answer) rows to rows to train on, with an account of every row that changed.

Notable: nothing is dropped or repaired in silence. Each row ends in the dataset or under one reason of
`CitationReport.dropped`, and each repair is counted, with the numbers of the rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft_dynamic.citations.passages import as_list, as_records, half_character, is_missing, passage_texts, read_indices
from peft_dynamic.citations.text import cited_ids, find_citations, hidden_citations, map_citations, normalise_citations

_COLUMNS = {"question": "question", "passages": "passages", "answer": "answer"}


@dataclass
class CitationReport:
    """What became of the rows.

    Attributes:
        rows: how many came in.
        kept: how many are in the dataset.
        dropped: from a reason to the numbers of the rows, from 0, that were left out for it; each row once.
        repaired: from a repair to the numbers of the kept rows that it was made in.
    """

    rows: int = 0
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    repaired: dict[str, list[int]] = field(default_factory=dict)

    def table(self) -> str:
        """The counts as Markdown."""
        lines = ["| rows | count |", "|---|---:|", f"| read | {self.rows} |", f"| kept | {self.kept} |"]
        for what, reasons in (("dropped", self.dropped), ("kept", self.repaired)):
            lines += [f"| {what}: {reason} | {len(rows)} |" for reason, rows in sorted(reasons.items())]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


class _Pool:
    """Passages to fill up with, each text once, and the questions that each belongs to."""

    def __init__(
        self, rows: Sequence[tuple[str, list[dict[str, str]], Any, Any]], own: list[dict[str, str]] | None
    ) -> None:
        self.passages: dict[str, dict[str, str]] = {}
        self.questions: dict[str, set[str]] = {}
        for question, listed in [("", own)] if own is not None else [(row[0], row[1]) for row in rows]:
            for passage in listed:
                if passage["text"]:
                    self.passages.setdefault(passage["text"], passage)
                    self.questions.setdefault(passage["text"], set()).add(question)
        self.texts = [*self.passages]

    def draw(self, count: int, question: str, taken: set[str], rng: random.Random) -> list[dict[str, str]]:
        """So many passages that are neither of this question nor taken; a few tries first, as most will do."""
        for tries in (4 * (count + len(taken)), len(self.texts)):
            drawn = rng.sample(self.texts, min(tries, len(self.texts)))
            fit = [text for text in drawn if text not in taken and question not in self.questions[text]]
            if len(fit) >= count:
                return [self.passages[text] for text in fit[:count]]
        raise _Drop("the pool has too few other passages to fill up with")


class _Drop(Exception):
    """A row that can't be used; the message is the reason."""


def read_passages(passages: Any, where: str) -> list[dict[str, str]]:
    """Passages as {"title", "text"} in their order.

    Args:
        passages: texts, or dicts with `text` and perhaps `title`.
        where: what they belong to, for the error.

    Raises:
        TypeError: it is no list of these.
    """
    passages = as_list(passages)
    if isinstance(passages, str | Mapping) or not isinstance(passages, Iterable):
        raise TypeError(f"the passages of {where} are {passages!r}: pass a list of texts or of dicts with `text`.")
    out = []
    for passage in passages:
        title, text = passage_texts(passage)
        if not isinstance(text, str) or not isinstance(title, str | None):
            raise TypeError(f"a passage of {where} is {passage!r}: a text, or a dict with texts in `text` and `title`.")
        out.append({"title": (title or "").strip(), "text": text.strip()})
    return out


def build_citation_dataset(
    rows: Iterable[Mapping[str, Any]],
    *,
    passages: int | None = 5,
    pool: Sequence[Any] | None = None,
    out_of_range: str = "drop",
    uncited: str = "drop",
    shuffle: bool = True,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
) -> tuple[Any, CitationReport]:
    """A dataset of questions, passages and answers whose citations are written `[1][2]` and point to a passage each.

    The ids of an answer count the passages from 1. Where the passages of a row have an `index` (2, "2" or 2.0), the ids
    are those. For each row, in this order:

    1. empty passages are taken away, and of equal ones all but the first, whose id the others' citations get;
    2. the marks are written as `normalise_citations` does, and ids that no passage has dropped or repaired;
    3. passages are cut down to `passages` (the cited ones stay), or filled up with irrelevant ones from the pool;
    4. passages are shuffled, and the ids follow them;
    5. a row with the same question, answer and passages as one before it is dropped.

    Args:
        rows: dicts, a `datasets.Dataset` or a pandas DataFrame, with a question, passages (texts, or dicts with `text`
            and perhaps `title`) and a cited answer.
        passages: how many each row gets (the paper has 5); None for as many as it has.
        pool: passages to fill up with. None for those of the other rows. That these are irrelevant is a hope: passages
            of the same question, and equal ones, are never taken; give a pool of your own for a guarantee.
        out_of_range: "drop" the rows that cite an id which no passage has, as invented sources tell of invented
            content; or "repair" them by taking that id away. A row with no other citation is dropped in either case.
        uncited: "drop" or "keep" the rows whose answer cites nothing.
        shuffle: whether to shuffle the passages, so that the cited one is not always the first.
        seed: of the shuffling and the filling up. A row's draw depends on it and on the row's number alone.
        columns: the names in `rows` of "question", "passages" and "answer", where these differ.

    Returns:
        A `datasets.Dataset`, and the report. Its columns are `question`, `passages` (a list of {"title", "text"}),
        `answer`, `cited` (the ids in the answer, sorted), `origin` and `row`. `origin` is for each passage its id in
        the row that came in, or 0 for one from the pool. `row` is the number of that row.

    Raises:
        ValueError, TypeError: an argument or a row has no meaning; the message names it, the rule and the fix. A row
            that can be read but not used is dropped and reported instead.

    Source: the cleaning, padding and shuffling of M. Tahaei et al.: Efficient Citer: Tuning Large Language Models for
    Enhanced Answer Quality and Verification, NAACL 2024 Findings, sections 2.1 and A.3. The order of the passages
    is not stated there; shuffling, and all that is said above of repairs, is ours.
    """
    names = _check(passages, out_of_range, uncited, columns)
    read = [_read(row, number, names) for number, row in enumerate(as_records(rows))]
    spare = _Pool(read, None if pool is None else read_passages(pool, "the pool"))
    report, kept, seen = CitationReport(rows=len(read)), [], set()
    for number, row in enumerate(read):
        notes: list[str] = []
        try:
            made = _build(
                row, notes, spare, passages, out_of_range, uncited, random.Random(f"{seed}:{number}"), shuffle
            )
            key = _identity(made)
            if key in seen:
                raise _Drop("duplicate of an earlier row")
        except _Drop as reason:
            report.dropped.setdefault(str(reason), []).append(number)
            continue
        seen.add(key)
        kept.append({**made, "row": number})
        for note in notes:
            report.repaired.setdefault(note, []).append(number)
    report.kept = len(kept)
    from datasets import Dataset

    if not kept:
        raise ValueError(f"none of the {len(read)} rows can be used:\n{report.table()}")
    return Dataset.from_list(kept), report


def _check(passages: int | None, out_of_range: str, uncited: str, columns: Mapping[str, str] | None) -> dict[str, str]:
    if passages is not None and (not isinstance(passages, int) or isinstance(passages, bool) or passages < 1):
        raise ValueError(f"passages={passages!r}: the number of passages is a positive int, or None to leave them.")
    for name, value, choices in (
        ("out_of_range", out_of_range, ("drop", "repair")),
        ("uncited", uncited, ("drop", "keep")),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose one of {choices}.")
    if unknown := set(columns or {}) - set(_COLUMNS):
        raise ValueError(f"columns has the keys {sorted(unknown)}: the rule is {sorted(_COLUMNS)}.")
    return _COLUMNS | dict(columns or {})


def _read(
    row: Mapping[str, Any], number: int, names: Mapping[str, str]
) -> tuple[str, list[dict[str, str]], dict[int, int], str]:
    """Question, passages, the place of each id and the answer."""
    for column in names.values():
        if column not in row:
            raise ValueError(
                f"row {number} has the columns {sorted(row)} and no {column!r}: say which is which with "
                f"columns={{'question': ..., 'passages': ..., 'answer': ...}}."
            )
    question, given, answer = (row[names[key]] for key in ("question", "passages", "answer"))
    answer = None if is_missing(answer) else answer
    if not isinstance(question, str) or not isinstance(answer, str | None):
        raise TypeError(f"row {number}: question and answer have to be texts, not {question!r} and {answer!r}.")
    given = [] if is_missing(given) else as_list(given)
    listed = read_passages(given, f"row {number}")
    indices = read_indices(given, f"row {number}")
    return question.strip(), listed, {index: place for place, index in enumerate(indices)}, (answer or "").strip()


def _build(
    row: tuple[str, list[dict[str, str]], dict[int, int], str],
    notes: list[str],
    pool: _Pool,
    wanted: int | None,
    out_of_range: str,
    uncited: str,
    rng: random.Random,
    shuffle: bool,
) -> dict[str, Any]:
    question, listed, places, answer = row
    if any(half_character(text) for text in (question, answer, *(text for p in listed for text in p.values()))):
        raise _Drop("holds half a character (a lone surrogate)")
    if not question:
        raise _Drop("no question")
    if not listed:
        raise _Drop("no passages")
    if not answer:
        raise _Drop("empty answer")
    origin, target = _merge(listed, places, notes)
    if not origin:
        raise _Drop("all passages are empty")
    answer = _repair(answer, target, out_of_range, uncited, notes)
    # From here on an id stands for a passage of the row as it came in: (its id there, title and text).
    chosen = [(index, listed[places[index]]) for index in origin]
    cited = cited_ids(answer)
    if wanted is not None and len(chosen) > wanted:
        if len(cited) > wanted:
            raise _Drop(f"cites more than {wanted} passages")
        notes.append(f"passages that are not cited taken away, down to {wanted}")
        room = wanted - len(cited)
        spare = {index for index, _ in [item for item in chosen if item[0] not in cited][:room]}
        chosen = [item for item in chosen if item[0] in spare or item[0] in cited]
    elif wanted is not None and len(chosen) < wanted:
        extra = pool.draw(wanted - len(chosen), question, {passage["text"] for _, passage in chosen}, rng)
        notes.append(f"filled up to {wanted} passages")
        chosen += [(0, passage) for passage in extra]
    if shuffle:
        rng.shuffle(chosen)
    new = {index: place for place, (index, _) in enumerate(chosen, 1) if index}
    answer = map_citations(answer, {old: new[old] for old in cited})
    return {
        "question": question,
        "passages": [passage for _, passage in chosen],
        "answer": answer,
        "cited": sorted(cited_ids(answer)),
        "origin": [index for index, _ in chosen],
    }


def _merge(listed: list[dict[str, str]], places: dict[int, int], notes: list[str]) -> tuple[list[int], dict[int, int]]:
    """The ids of the passages that stay, and for each id that may be cited the one of these that it stands for."""
    first: dict[tuple[str, str], int] = {}
    target: dict[int, int] = {}
    for index, place in places.items():
        passage = listed[place]
        if not passage["text"]:
            notes.append("empty passages taken away")
            continue
        target[index] = first.setdefault((passage["title"], passage["text"]), index)
        if target[index] != index:
            notes.append("equal passages made one")
    notes[:] = dict.fromkeys(notes)
    return [*first.values()], target


def _repair(answer: str, target: dict[int, int], out_of_range: str, uncited: str, notes: list[str]) -> str:
    """The answer with its marks normalised and every id one of a passage that stays."""
    if hidden_citations(answer):
        notes.append("citation marks within code or URLs left alone")
    normal = normalise_citations(answer)
    if normal != answer:
        notes.append("citation marks rewritten")
    had = bool(find_citations(normal))
    wrong = [i for i in cited_ids(normal) if i not in target]
    if wrong and out_of_range == "drop":
        raise _Drop("cites an id that no passage has")
    if wrong:
        notes.append("ids that no passage has taken away")
    # Merged passages can bring an id into a run twice, so normalise once more.
    normal = normalise_citations(map_citations(normal, target.get))
    if not find_citations(normal) and (had or uncited == "drop"):
        raise _Drop("cites only ids that no passage has" if had else "cites nothing")
    if not find_citations(normal):
        notes.append("cites nothing")
    return normal


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a row the same as another one: not the order of its passages, nor those from the pool."""
    own = sorted((p["title"], p["text"]) for p, index in zip(row["passages"], row["origin"], strict=True) if index)
    texts = {place: p["text"] for place, p in enumerate(row["passages"], 1)}
    return row["question"].casefold(), tuple(own), _by_text(row["answer"], texts)


def _by_text(answer: str, texts: Mapping[int, str]) -> str:
    """The answer with each mark replaced by the passage that it points to."""
    out, last = "", 0
    for start, end, ids in find_citations(answer):
        out += answer[last:start] + "".join(f"[{texts[i]}]" for i in ids)
        last = end
    return out + answer[last:]
