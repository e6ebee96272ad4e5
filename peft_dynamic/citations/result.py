"""What an evaluation of cited answers found: its scores, its answers, and the files to look at."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

from peft_dynamic.citations.answers import Answer
from peft_dynamic.citations.report import render, score_table


@dataclass
class CitationEvaluation:
    """What `evaluate_citations` found.

    Attributes:
        answers: one for each row, sentence by sentence.
        scores: the means over the answers, in percent (`length` in words). A name with brackets, as in
            `citation_recall[judge=minilm]`, is of a score that is not comparable with published ones, and says why.
        notes: what a reader of the scores has to know, one sentence each.
        counts: how many answers, sentences, citations and so on.
    """

    answers: list[Answer]
    scores: dict[str, float]
    notes: list[str]
    counts: dict[str, int]

    def __getitem__(self, name: str) -> float:
        """A score by its name with or without the brackets."""
        for key, value in self.scores.items():
            if name in (key, key.split("[")[0]):
                return value
        raise KeyError(f"no score {name!r}; there are {', '.join(self.scores)}")

    @property
    def citation_recall(self) -> float:
        """The mean share of an answer's sentences that their citations support, in percent."""
        return self["citation_recall"]

    @property
    def citation_precision(self) -> float:
        """The mean share of an answer's citations that are needed, in percent."""
        return self["citation_precision"]

    def table(self) -> str:
        """The scores as a table in Markdown, with the notes."""
        return score_table(self.scores, self.notes)

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write all of it, the answers too."""
        Path(path).write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def report(self, path: str | PathLike[str]) -> None:
        """Write a report to look at, HTML or Markdown after the path's suffix: each sentence with its citations."""
        Path(path).write_text(render(self.answers, self.scores, self.notes, Path(path).suffix), encoding="utf-8")
