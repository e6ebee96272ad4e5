"""Citation marks in an answer: find them in whatever style they are written, and rewrite them as [1][2].

Notable: a mark is a bracket or a superscript that holds passage ids. Round brackets and superscripts are also used for
other things, so these two count only where they stand like a citation; `find_citations` has the rules. Code and URLs
are left alone, and `hidden_citations` counts the marks in there, so that nothing is lost unseen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

_WIDEST_RANGE = 100  # [1-3] is three ids; [1-99999] is not a citation
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_ASCII = str.maketrans(_SUPERSCRIPTS, "0123456789")
_UNITS = {"min", "sec", "mol", "rad", "mil", "yds", "lbs", "bar"}  # of three letters; shorter words never count

_NUMBER = r"\d{1,6}"
_RANGE = rf"{_NUMBER}(?:\s*[-‐-―−~]\s*{_NUMBER})?"
_LIST = rf"\s*{_RANGE}(?:\s*(?:[,;，；、&]|\band\b)\s*{_RANGE})*\s*"
_SQUARE = rf"[\[［【〔〚⟦]{_LIST}[\]］】〕〛⟧]"
_ROUND = rf"[(（]{_LIST}[)）]"
_RAISED = rf"<sup>\s*\[?{_LIST}\]?\s*</sup>|⁽?[{_SUPERSCRIPTS}]{{1,6}}(?:\s?[,˒⸴][{_SUPERSCRIPTS}]{{1,6}})*⁾?"
_MARK = re.compile(rf"(?P<raised>{_RAISED})|(?P<square>{_SQUARE})|(?P<round>{_ROUND})", re.I)
_ITEM = re.compile(rf"({_NUMBER})(?:\s*[-‐-―−~]\s*({_NUMBER}))?")

_FENCE = r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n]*\n.*?(?:^[ \t]*(?P=fence)[`~]*[ \t]*$|\Z)"
_CODE = re.compile(rf"{_FENCE}|(?<!`)(?P<ticks>`+)(?!`)[^\n]*?[^`\n](?P=ticks)(?!`)|<code>.*?</code>", re.M | re.S)
_URL = re.compile(r"(?:https?://|\bwww\.)[^\s<>\"“”]+", re.I)

_END = ".!?…。！？"
_CLOSERS = "\"'”’»)）」』"
_ABBREVIATION = re.compile(
    r"mrs?|ms|dr|prof|st|rev|gen|col|lt|sgt|capt|gov|sen|rep|hon|[js]r|inc|ltd|co|corp|vs|etc|al|nos?|vol|figs?|eq|sec"
    r"|ch|pp|eds?|approx|dept|est|ca|cf|viz|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|(?!i$)[^\W\d_]"
    r"|(?:[^\W\d_]\.)+[^\W\d_]",
    re.I,
)


class Citation(NamedTuple):
    """One mark: `text[start:end]` is what is written, `ids` the passages it names, from 1, as they are written."""

    start: int
    end: int
    ids: tuple[int, ...]


def find_citations(text: str) -> list[Citation]:
    """The citation marks of a text, in their order.

    These are marks: [1], [1, 2], [1; 2], [1 and 2], [1-3] (that is 1, 2 and 3), the same in ［］, 【】 and 〔〕, and
    `<sup>1</sup>`. (1) and (1, 2) only in a text without any of these, behind a word and a space, a punctuation mark or
    another mark, and before a punctuation mark, another mark or the end of a line: "in May (1)." is one, "two reasons:
    (1) cost and (2) time", "f(1)", "(772)" and "goals (72) [1]" are none. ¹ and ¹,² only behind a punctuation mark or
    a word of three letters or more that is no unit: "10³", "x²" and "km²" are none. Nothing within code or a URL is.

    An id may be any number, 0 and such beyond the passages included: whether it is valid is the caller's question.

    Args:
        text: an answer.

    Returns:
        Citations that do not overlap.
    """
    return _find(text, _protected(text))


def hidden_citations(text: str) -> int:
    """How many marks stand within code or URLs, where they are left alone."""
    hidden = [text[start:end] for start, end in _protected(text)]
    return sum(len(re.findall(_SQUARE, piece)) for piece in hidden)


def cited_ids(text: str) -> list[int]:
    """The ids that a text cites, each once, in the order of their first mention."""
    return list(dict.fromkeys(i for citation in find_citations(text) for i in citation.ids))


def map_citations(text: str, mapping: Mapping[int, int | None] | Callable[[int], int | None]) -> str:
    """The text with every cited id replaced, and its marks written as [1][2].

    Args:
        text: an answer.
        mapping: from an id to the new one, or to None to take it away. An id that a dict lacks stays as it is.

    Returns:
        The text; all else in it is as it was, but for the space before a mark that is taken away.
    """
    return _rewrite(text, find_citations(text), mapping if callable(mapping) else lambda i: mapping.get(i, i))


def _rewrite(text: str, marks: list[Citation], change: Callable[[int], int | None]) -> str:
    out: list[str] = []
    last = 0
    for start, end, ids in marks:
        new = list(dict.fromkeys(j for j in map(change, ids) if j is not None))
        out.append(text[last:start])
        last = end
        if new:
            if text[start] == "<" and text[start - 1 : start].strip():
                out.append(" ")  # a URL ends at <sup>, but would go on over a [
            out.append("".join(f"[{j}]" for j in new))
            continue
        # Nothing is left of the mark: close the gap, and at the start of a line the one behind it.
        before = "".join(out)
        kept = before.rstrip(" \t")
        if not kept or kept.endswith("\n"):
            out, last = [kept], end + len(text[end:]) - len(text[end:].lstrip(" \t"))
        elif end == len(text) or text[end] in f"{_END},;: \t\n":
            out = [kept]
    return "".join(out) + text[last:]


def strip_citations(text: str) -> str:
    """The text without its citation marks, the spaces before them and the commas between them."""
    return map_citations(normalise_citations(text), lambda _: None)


def normalise_citations(text: str) -> str:
    """The text with every mark written as [1][2], and before the end of its sentence.

    Marks next to each other, or with a comma between them, become one run in which no id comes twice. A run behind the
    end of a sentence ("So it is. [1] Then") moves before it ("So it is [1]. Then"), where sentence splitters count it
    to the sentence that it is for, and a second full stop behind it goes ("So it is. [1]. Then"). A run stays where it
    is when the next sentence needs it ("So it is. [1] says"), in a line that has its marks in front ("[1] So it is. [2]
    Then it was."), and where moving it would make a mark of what is none, or hide one in a URL.

    Args:
        text: an answer.

    Returns:
        The text. Normalising it again changes nothing.
    """
    written = map_citations(text, lambda i: i)
    text = written if _says(written) == _says(text) else text
    while (settled := _settle(text)) != text:
        text = settled  # a run that moved may now stand behind another
    return text


def _says(text: str) -> tuple[list[int], int]:
    """What no rewriting may change."""
    return cited_ids(text), hidden_citations(text)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, without the spaces between them: a plain rule for English, no model.

    A sentence ends at a line break, or at . ! ? and what closes them (quotes, brackets, citation marks) before a space
    and a sentence's start; not after an abbreviation or an initial, and not within code or a URL.
    """
    return [text[start:end] for start, end in _sentences(text)]


def _sentences(text: str) -> list[tuple[int, int]]:
    protected = _protected(text)
    marks = [(start, end) for start, end, _ in _find(text, protected)]
    whole = sorted([*protected, *marks])  # a mark may hold a line break
    cuts, start, i = [], 0, 0
    while i < len(text):
        inside = next((end for begin, end in whole if begin <= i < end), None)
        if inside is not None:
            i = inside
            continue
        if text[i] == "\n":
            cuts.append((start, i))
            start = i = i + 1
            continue
        if text[i] in _END:
            end = _past_closers(text, i, marks)
            rest = text[end:].lstrip(" \t")
            spaced = len(rest) < len(text) - end
            place = len(text) - len(rest)
            # what ends before a mark that stands in front is a sentence, "A." too
            fronted = any(begin == place for begin, _ in marks) and _marks_stand_in_front(text, place)
            abbreviated = not fronted and _is_abbreviation(text[start : i + 1])
            starts = spaced and rest and not rest[0].islower() and not abbreviated
            if starts or text[i] in "。！？":
                cuts.append((start, end))
                start = end
            i = max(end, i + 1)
            continue
        i += 1
    cuts.append((start, len(text)))
    spans = []
    for begin, end in cuts:
        piece = text[begin:end]
        begin += len(piece) - len(piece.lstrip())
        if piece.strip():
            spans.append((begin, begin + len(piece.strip())))
    return spans


def sentence_citations(text: str) -> list[tuple[str, list[int]]]:
    """Each sentence without its marks, and the ids it cites, each once, as they are written."""
    found = find_citations(text)  # in the whole text: a sentence alone does not say which style it is in
    pairs = []
    for start, end in _sentences(text):
        marks = [Citation(a - start, b - start, ids) for a, b, ids in found if start <= a < end]
        ids = list(dict.fromkeys(i for mark in marks for i in mark.ids))
        sentence = _rewrite(text[start:end], marks, lambda _: None)
        if marks and text[marks[-1].end + start : end].strip() == "." and sentence[-2:-1] in _END and sentence[:-2]:
            sentence = sentence[:-1]  # "So it is. [1]." has ended before
        pairs.append((sentence, ids))
    return pairs


def _settle(text: str) -> str:
    """The text with one run of marks joined, or moved before the sentence end that it stands behind; or as it is."""
    marks = find_citations(text)
    runs: list[tuple[int, int, list[int]]] = []
    for start, end, ids in marks:
        if runs and re.fullmatch(r"[ \t]*[,;]?[ \t]*", text[runs[-1][1] : start]):
            first, _, known = runs.pop()
            runs.append((first, end, [*known, *ids]))
        else:
            runs.append((start, end, [*ids]))
    said = _says(text)
    for start, end, listed in runs:
        mark = "".join(f"[{i}]" for i in dict.fromkeys(listed))
        for changed in (_moved(text, start, end, mark), text[:start] + mark + text[end:]):
            if changed not in (None, text) and _says(changed) == said:
                return changed
    return text


def _moved(text: str, start: int, end: int, mark: str) -> str | None:
    """The text with the run at start..end before the sentence end that it stands behind; None where it stays."""
    ended = re.search(rf"[{re.escape(_END)}]+[{re.escape(_CLOSERS)}]*[ \t]*\Z", text[:start])
    # "e.g. [1]" is no end, nor is a full stop that opens a line.
    if not ended or not text[: ended.start()].strip(" \t")[-1:].strip() or _is_abbreviation(text[:start]):
        return None
    again = re.match(rf"[{re.escape(_END)}](?=\s|\Z)", text[end:])
    rest = text[end + len(again[0] if again else "") :]
    follows = rest.lstrip(" \t")
    if follows and follows[0] not in "\r\n":
        spaced = rest[0] in " \t" and not follows[0].islower()
        if not spaced or (not again and _marks_stand_in_front(text, start)):
            return None
    sentence = text[: ended.start()].rstrip(" \t")
    behind_a_mark = any(citation.end == len(sentence) for citation in find_citations(sentence))
    return sentence + ("" if behind_a_mark else " ") + mark + ended[0].rstrip(" \t") + rest


def _marks_stand_in_front(text: str, place: int) -> bool:
    """Whether the line of `place` begins with a mark that is no subject: "[1] So it is. [2] Then it was."."""
    line = text[text.rfind("\n", 0, place) + 1 :].lstrip(" \t")
    opening = re.match(rf"(?:{_SQUARE}[ \t]*)+", line)
    if opening is None:
        return False
    rest = line[opening.end() :]
    return bool(rest) and rest[0] != "\n" and not rest[0].islower() and rest[0] not in f"{_END},;:"


def _find(text: str, protected: list[tuple[int, int]]) -> list[Citation]:
    marks = [
        match
        for match in _MARK.finditer(text)
        if not any(begin < match.end() and match.start() < stop for begin, stop in protected)
    ]
    other = any(match["round"] is None and match[0][0] in "[［【〔〚⟦<" and _ids(match[0]) for match in marks)
    found: list[Citation] = []
    for match in marks:
        start, end = match.span()
        ids = _ids(match[0])
        if ids is None or (match["raised"] and not _raised_stands_so(text, start, found)):
            continue
        if match["round"] and (other or not _round_stands_so(text, start, end, found)):
            continue
        found.append(Citation(start, end, ids))
    return found


def _protected(text: str) -> list[tuple[int, int]]:
    """Spans of code and URLs, sorted; a URL ends at a bracket that it did not open."""
    spans = [match.span() for match in _CODE.finditer(text)]
    for match in _URL.finditer(text):
        end, opened = match.start(), []
        for character in match[0]:
            if character in "([{":
                opened.append(character)
            elif character in ")]}" and (not opened or opened.pop() != "([{"[")]}".index(character)]):
                break
            end += 1
        if not any(start <= match.start() < stop for start, stop in spans):
            spans.append((match.start(), end))
    return sorted(spans)


def _ids(mark: str) -> tuple[int, ...] | None:
    """The ids that a mark lists, or None where it holds a range that runs backwards or too far."""
    ids: list[int] = []
    for first, last in _ITEM.findall(mark.translate(_ASCII)):
        low, high = int(first), int(last or first)
        if not low <= high <= low + _WIDEST_RANGE:
            return None
        ids.extend(range(low, high + 1))
    return tuple(ids)


def _round_stands_so(text: str, start: int, end: int, found: list[Citation]) -> bool:
    if len(max(re.findall(r"\d+", text[start:end]), key=len)) > 2:
        return False  # a year or another number
    if found and found[-1].end == start:
        return True
    before = text[:start].rstrip(" \t")
    spaced = len(before) < start
    # Behind a comma or a full stop and a space it is the next item of a list.
    if before[-1:] in ("", "\n", ":") or (before[-1] in ",;." if spaced else before[-1] not in f"{_END}{_CLOSERS},;"):
        return False
    after = text[end:].lstrip(" \t")
    return not after or after[0] in f"\n{_END},;:" or _MARK.match(after) is not None


def _raised_stands_so(text: str, start: int, found: list[Citation]) -> bool:
    if text[start] == "<" or (found and found[-1].end == start):
        return True
    if start and text[start - 1] in f"{_END}{_CLOSERS},;:":
        return True
    word = re.search(r"[^\W\d_]+\Z", text[:start])
    if word is None or text[: word.start()][-1:].isdigit():
        return False
    return len(word[0]) > 2 and word[0].lower() not in _UNITS


def _is_abbreviation(text: str) -> bool:
    """Whether the full stop at the end of `text` is that of an abbreviation or an initial."""
    match = re.search(r"(?:^|[\s(\"“'])((?:[^\W\d_]+\.)*[^\W\d_]+)\.[\s\"'”’)]*\Z", text)
    return match is not None and bool(_ABBREVIATION.fullmatch(match[1]))


def _past_closers(text: str, i: int, marks: list[tuple[int, int]]) -> int:
    """The place behind the marks of sentence end at i, and behind the quotes, brackets and citations that follow."""
    i = _past(text, i)
    for begin, end in marks:
        if begin >= i and not text[i:begin].strip(" \t") and not _opens(text, begin, end):
            i = _past(text, end)
    return i


def _past(text: str, i: int) -> int:
    while i < len(text) and text[i] in _END + _CLOSERS:
        i += 1
    return i


def _opens(text: str, begin: int, end: int) -> bool:
    """Whether what follows a mark needs it: as its subject ("[1] says"), or since marks stand in front in this line."""
    follows = text[end:].lstrip(" \t")
    if follows[:1].islower():
        return True
    return follows[:1] not in ("", "\n", *_END) and _marks_stand_in_front(text, begin)
