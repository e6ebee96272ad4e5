"""One answer that was evaluated, sentence by sentence."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft_dynamic.citations.rows import Passage


@dataclass
class Sentence:
    """One sentence of an answer (or item of a list), its citations, and what the judge says of them."""

    text: str
    statement: str  # without the citations: the hypothesis
    citations: list[int]  # as written, from 1
    counted: list[int] = field(default_factory=list)  # the first so many, or none if one is out of range
    out_of_range: bool = False
    supported: bool = False  # by the counted citations together
    support: float | None = None  # how sure the judge is of that; None if it was not asked
    needed: list[bool] = field(default_factory=list)  # for each counted citation, whether it earns precision


@dataclass
class Answer:
    """One evaluated answer. `scores` are shares from 0 to 1; one that the answer does not take part in is absent."""

    question: str
    output: str  # what was evaluated of it
    passages: list[Passage]
    sentences: list[Sentence]
    scores: dict[str, float]

    def passage(self, index: int) -> str:
        """The passage that an id cites, as the judge reads it."""
        return next(str(passage) for passage in self.passages if passage.index == index)
