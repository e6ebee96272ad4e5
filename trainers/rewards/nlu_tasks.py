"""The tasks of GLUE and SuperGLUE, as instructions that a language model answers with a word between two tags.

One row of `TASKS` has all that is particular to a task. The columns and label numbers are those of the Hub's
`nyu-mll/glue` and `super_glue`; where the two name a column differently, both names are taken.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

Row = Mapping[str, Any]

HIGHEST_SIMILARITY = 5.0  # of STS-B, from 0


@dataclass(frozen=True)
class NLUTask:
    """One task.

    Args:
        name: its name, as in `nlu_prompt(name, row)`.
        instruction: who is asked, and for what.
        inputs: per input the name that the prompt shows, and the columns that may hold it.
        words: the answer for each label, `words[label]`; empty for a number from 0 to 5.
        metrics: the official metrics, by the names of `nlu_metrics`.
        unclear: the reward of an answer in tags that has none of the words, or several.
    """

    name: str
    instruction: str
    inputs: tuple[tuple[str, tuple[str, ...]], ...]
    words: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    unclear: float = -3.0

    def text(self, row: Row) -> str:
        """The inputs of a row, one a line.

        Raises:
            ValueError: the row has no column for one of them.
        """
        return "\n".join(f'{shown}: "{self._value(row, columns)}"' for shown, columns in self.inputs)

    def _value(self, row: Row, columns: tuple[str, ...]) -> Any:
        for column in columns:
            if row.get(column) is not None:
                return row[column]
        hint = " Make such rows with record_rows(row)." if self.name == "record" else ""
        raise ValueError(
            f"row: the task {self.name!r} needs a column {' or '.join(map(repr, columns))}, and the row has "
            f"{sorted(row)}. Rename the column that holds it.{hint}"
        )

    def gold(self, label: Any) -> int | float:
        """A label, checked.

        Raises:
            ValueError: it is not one of the task's, or it is the -1 of rows without one.
        """
        if self.words:
            fits = isinstance(label, Integral) and not isinstance(label, bool) and 0 <= int(label) < len(self.words)
            meant = ", ".join(f"{number} ({word})" for number, word in enumerate(self.words))
            rule = f"must be one of the integers {meant}"
        else:
            fits = isinstance(label, Real) and not isinstance(label, bool) and 0 <= float(label) <= HIGHEST_SIMILARITY
            rule = "must be a number from 0 to 5"
        if not fits:
            unlabelled = " -1 marks a row without a label: leave those out." if label == -1 else ""
            raise ValueError(f"label={label!r}: for the task {self.name!r} it {rule}.{unlabelled}")
        return int(label) if self.words else float(label)

    def answer(self, label: Any) -> str:
        """The right answer for a label: a label word, or a number with one decimal."""
        gold = self.gold(label)
        return self.words[int(gold)] if self.words else f"{gold:.1f}"


def _columns(*inputs: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """From "Shown name: column, other column"."""
    split = (text.partition(": ") for text in inputs)
    return tuple((shown, tuple(columns.split(", "))) for shown, _, columns in split)


NO_YES, YES_NO = ("No", "Yes"), ("Yes", "No")
PAIR = _columns("Text: sentence1, premise", "Hypothesis: sentence2, hypothesis")
ENTAILS = "Decide whether the text entails the hypothesis."
INFERENCE = "Decide whether the premise entails the hypothesis, contradicts it, or is neutral to it."
PREMISE = _columns("Premise: premise", "Hypothesis: hypothesis")

TASKS = {
    task.name: task
    for task in (
        NLUTask(
            "cola",
            "You are a linguist. Decide whether the sentence is acceptable English.",
            _columns("Sentence: sentence"),
            NO_YES,
            ("matthews_correlation",),
        ),
        NLUTask(
            "sst2",
            "You are a film critic. Decide whether the sentiment of the sentence is positive or negative.",
            _columns("Sentence: sentence"),
            ("Negative", "Positive"),
        ),
        NLUTask(
            "mrpc",
            "You are an editor. Decide whether the two sentences mean the same.",
            _columns("Sentence 1: sentence1", "Sentence 2: sentence2"),
            NO_YES,
            ("accuracy", "f1"),
        ),
        NLUTask(
            "qqp",
            "You are a moderator. Decide whether the two questions ask the same.",
            _columns("Question 1: question1", "Question 2: question2"),
            NO_YES,
            ("accuracy", "f1"),
        ),
        NLUTask(
            "stsb",
            "You are an editor. Rate how alike the two sentences are in meaning, from 0 (not at all) to 5 (the same).",
            _columns("Sentence 1: sentence1", "Sentence 2: sentence2"),
            (),
            ("pearson", "spearmanr"),
            -HIGHEST_SIMILARITY / 2,
        ),
        NLUTask("mnli", f"You are a logician. {INFERENCE}", PREMISE, ("Entailment", "Neutral", "Contradiction")),
        NLUTask(
            "qnli",
            "You are a teacher. Decide whether the sentence answers the question.",
            _columns("Question: question", "Sentence: sentence"),
            YES_NO,
        ),
        NLUTask("rte", f"You are a logician. {ENTAILS}", PAIR, YES_NO),
        NLUTask("wnli", f"You are a logician. Mind the pronouns. {ENTAILS}", PAIR, NO_YES),
        NLUTask(
            "ax",
            f"You are a logician. {INFERENCE}",
            PREMISE,
            ("Entailment", "Neutral", "Contradiction"),
            ("matthews_correlation",),
        ),
        NLUTask(
            "boolq",
            "You are a librarian. Answer the question by the passage.",
            _columns("Passage: passage", "Question: question"),
            NO_YES,
        ),
        NLUTask(
            "cb",
            f"You are a logician. {INFERENCE}",
            PREMISE,
            ("Entailment", "Contradiction", "Neutral"),
            ("accuracy", "f1_macro"),
        ),
        NLUTask(
            "copa",
            "You are a detective. Decide which option is the likelier cause or effect, as asked, of the premise.",
            _columns("Premise: premise", "Asked for: question", "Option one: choice1", "Option two: choice2"),
            ("Option one", "Option two"),
        ),
        NLUTask(
            "wic",
            "You are a lexicographer. Decide whether the word has the same or different meanings in the sentences.",
            _columns("Word: word", "Sentence 1: sentence1", "Sentence 2: sentence2"),
            ("Different", "Same"),
        ),
        NLUTask(
            "wsc",
            "You are a linguist. Decide whether the pronoun stands for the noun in the text.",
            _columns("Text: text", "Pronoun: span2_text", "Noun: span1_text"),
            NO_YES,
        ),
        NLUTask(
            "multirc",
            "You are a teacher. Decide whether the answer to the question is true by the paragraph.",
            _columns("Paragraph: paragraph", "Question: question", "Answer: answer"),
            ("False", "True"),
            ("f1_a", "question_exact_match"),
        ),
        NLUTask(
            "record",
            "You are a journalist. Decide whether the statement agrees with the passage.",
            _columns("Passage: passage", "Statement: statement"),
            NO_YES,
            ("token_f1", "entity_exact_match"),
            -1.0,
        ),
    )
}


def task_named(task: str) -> NLUTask:
    """The task of that name; capitals, hyphens and underscores do not matter.

    Raises:
        ValueError: there is none.
    """
    found = TASKS.get(str(task).lower().replace("-", "").replace("_", ""))
    if found is None:
        raise ValueError(f"task={task!r} is not known; there are {', '.join(TASKS)}.")
    return found


def record_rows(row: Row, seed: int | None = None) -> list[dict[str, Any]]:
    """The yes-or-no rows of one ReCoRD query: is it true with this entity in the gap?

    A query counts as one row per distinct entity of its passage, which is what `evaluate_nlu` needs. With a seed they
    are the two that the paper trains on: one right entity and one wrong one, drawn at random.

    Args:
        row: a row of `super_glue`'s `record`: `passage`, `query` with `@placeholder` in it, `entities`, `answers`.
        seed: of the draw; None for all entities. The draw depends on the query as well.

    Returns:
        Rows with the columns of `row` and `statement`, `entity` and `label` (1 if the entity is an answer). With a seed
        fewer than two if the query has no answer, or nothing but answers.
    """
    passage = " ".join(row["passage"].replace("@highlight", " ").split())
    answers = list(dict.fromkeys(row["answers"]))
    entities = list(dict.fromkeys([*row["entities"], *answers] if seed is not None else row["entities"]))
    if seed is not None:
        draw = random.Random(f"{seed} {row['query']}")
        wrong = [entity for entity in entities if entity not in answers]
        entities = [draw.choice(kind) for kind in (answers, wrong) if kind]
    return [
        {
            **row,
            "passage": passage,
            "statement": row["query"].replace("@placeholder", entity),
            "entity": entity,
            "label": int(entity in answers),
        }
        for entity in entities
    ]
