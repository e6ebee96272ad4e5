"""A report of an evaluation that a person can look at: each sentence with its citations, supported or not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from peft_dynamic.citations.answers import Answer, Sentence

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; } td { padding: .1rem 1rem .1rem 0; } td + td { text-align: right; }
article { border-top: 1px solid #bbb; margin-top: 1.5rem; } h2 { font-size: 1.1rem; }
ol.sentences { padding-left: 0; list-style: none; }
.sentences li { margin: .4rem 0; padding: .3rem .6rem; border-left: .3rem solid; }
.supported { border-color: #2a7d46; } .unsupported { border-color: #b3261e; } .uncited { border-color: #8a8a8a; }
.verdict, .citation { font-size: .8rem; margin-left: .4rem; padding: 0 .4rem; border-radius: .6rem; }
.verdict { background: #eee; } .needed { background: #d5efdc; } .not-needed { background: #fbe3c6; }
.bad { background: #f8d4d1; }
.scores, .notes { color: #555; font-size: .9rem; } details p { white-space: pre-wrap; }
"""


def score_table(scores: dict[str, float], notes: list[str]) -> str:
    """The scores as a table in Markdown, with the notes."""
    rows = [f"| {name} | {value:.1f} |" for name, value in scores.items()]
    return "\n".join(["| score | |", "|---|---|", *rows, *(f"\n{note}" for note in notes)])


def render(answers: list[Answer], scores: dict[str, float], notes: list[str], suffix: str) -> str:
    """The report, in HTML (".html", ".htm") or Markdown (".md")."""
    if suffix in (".html", ".htm"):
        return _html(answers, scores, notes)
    if suffix == ".md":
        return _markdown(answers, scores, notes)
    raise ValueError(f"a report's path must end in .html or .md, and this one ends in {suffix!r}")


def verdict(sentence: Sentence) -> str:
    """What is found of a sentence, in words."""
    if not sentence.citations:
        return "no citation"
    if sentence.out_of_range:
        return "cites out of range"
    return "supported" if sentence.supported else "not supported"


def _citations(sentence: Sentence, answer: Answer) -> Iterator[tuple[str, str]]:
    """For each citation its mark and what is found of it."""
    for k, i in enumerate(sentence.citations):
        if sentence.out_of_range:
            found = "not counted" if any(i == passage.index for passage in answer.passages) else "no such passage"
        elif k >= len(sentence.counted):
            found = "not counted, too many"
        elif not sentence.supported:
            found = "does not support it"
        else:
            found = "needed" if sentence.needed[k] else "not needed"
        yield f"[{i}]", found


def _scores(answer: Answer) -> str:
    named = {name: value for name, value in answer.scores.items() if name != "length"}
    return ", ".join(f"{name} {value:.2f}" for name, value in named.items())


def _html(answers: list[Answer], scores: dict[str, float], notes: list[str]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value:.1f}</td></tr>" for name, value in scores.items())
    remarks = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>Citations</title>"
        f"<style>{_STYLE}</style></head><body><h1>Citations</h1><table>{rows}</table>"
        f"<div class='notes'>{remarks}</div>\n"
        + "\n".join(_html_answer(answer, i) for i, answer in enumerate(answers, 1))
        + "\n</body></html>\n"
    )


def _html_answer(answer: Answer, number: int) -> str:
    sentences = "".join(_html_sentence(sentence, answer) for sentence in answer.sentences)
    passages = "".join(
        f"<p><b>[{passage.index}] {escape(passage.title or '')}</b> {escape(passage.text)}</p>"
        for passage in answer.passages
    )
    return (
        f"<article><h2>{number}. {escape(answer.question)}</h2>"
        + (f"<ol class='sentences'>{sentences}</ol>" if sentences else "<p>(empty answer)</p>")
        + f"<p class='scores'>{escape(_scores(answer))}</p>"
        + f"<details><summary>{len(answer.passages)} passages</summary>{passages}</details></article>"
    )


def _html_sentence(sentence: Sentence, answer: Answer) -> str:
    found = verdict(sentence)
    kind = "supported" if sentence.supported else "unsupported" if sentence.citations else "uncited"
    sure = "" if sentence.support is None else f" ({sentence.support:.2f})"
    marks = "".join(
        f" <span class='citation {_kind(what)}'>{mark} {what}</span>" for mark, what in _citations(sentence, answer)
    )
    return f"<li class='{kind}'>{escape(sentence.statement)} <span class='verdict'>{found}{sure}</span>{marks}</li>"


def _kind(found: str) -> str:
    return {"needed": "needed", "not needed": "not-needed"}.get(found, "bad")


def _markdown(answers: list[Answer], scores: dict[str, float], notes: list[str]) -> str:
    parts = ["# Citations", score_table(scores, notes)]
    for number, answer in enumerate(answers, 1):
        parts.append(f"## {number}. {_plain(answer.question)}")
        lines = []
        for sentence in answer.sentences:
            marks = "; ".join(f"{mark} {found}" for mark, found in _citations(sentence, answer))
            detail = f"{verdict(sentence)}: {marks}" if marks else verdict(sentence)
            lines.append(f"- {_plain(sentence.statement)}\n  - **{_plain(detail)}**")
        parts.append("\n".join(lines) or "(empty answer)")
        parts.append(_plain(_scores(answer)))
        parts.append(
            "\n".join(
                f"> {_plain(f'[{passage.index}] {passage.title or str()} {passage.text}')}\n>"
                for passage in answer.passages
            )
        )
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """On one line, with what Markdown and HTML would take for their own escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))
