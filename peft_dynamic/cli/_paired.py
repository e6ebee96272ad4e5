"""Scores of several models on the same examples, example by example, and the intervals of their differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peft_dynamic.cli._encode import encode_all
from peft_dynamic.cli._measure import Batch, label_values, placed_batches, row_losses, text_values
from peft_dynamic.cli._task import LabelTask, TextTask
from peft_dynamic.reports.curve import direction

DRAWS = 4000


@dataclass
class Examples:
    """The rows of a task as one model reads them.

    Attributes:
        batches: places in the rows -> the batch.
        owner: for each row, the example that it is of.
        whole: for each example, whether nothing of it was cut.
    """

    batches: list[tuple[list[int], Batch]]
    owner: list[int]
    whole: list[bool]


def examples(task: TextTask | LabelTask, model: Any, tokenizer: Any) -> Examples:
    """The rows of a task for a model."""
    size = task.given.batch_size
    if isinstance(task, LabelTask):
        encoded, collator = task.encoded(model, tokenizer)
        count = len(encoded)
        return Examples(placed_batches(encoded, tokenizer, size, collator), [*range(count)], [True] * count)
    found = [encode_all([example], tokenizer, task.given.max_length) for example in task.examples]
    rows = [(place, row) for place, each in enumerate(found) for row in each.rows]
    whole = [bool(each.rows) and not each.lost and not each.cut for each in found]
    made = placed_batches([row for _, row in rows], tokenizer, size)
    return Examples(made, [place for place, _ in rows], whole)


def scored(model: Any, task: TextTask | LabelTask, read: Examples, dtype: torch.dtype) -> list[Any]:
    """What each example has: of text the sum of its losses and the tokens, of a classifier its metrics."""
    if isinstance(task, LabelTask):
        labelled: list[Any] = [None] * len(read.owner)
        for places, batch in read.batches:
            values = label_values(model, batch, dtype)
            for i, place in enumerate(places):
                labelled[place] = {name: found[i] for name, found in values.items()}
        return labelled
    sums = [(0.0, 0) for _ in read.whole]
    for places, batch in read.batches:
        for place, (loss, count) in zip(places, row_losses(model, batch, dtype), strict=True):
            total, tokens = sums[read.owner[place]]
            sums[read.owner[place]] = (total + loss, tokens + count)
    return sums


@dataclass
class Table:
    """The scores of several models over the examples that all of them have.

    Attributes:
        values: for each model, metric -> a value for each example, or one number.
        used: how many examples there are.
        metric: what is compared.
        alike: whether all models read the same tokens.
    """

    values: list[dict[str, Any]]
    used: int
    metric: str
    alike: bool


def table(scores: list[list[Any]], whole: list[list[bool]], metric: str | None) -> Table:
    """The scores side by side.

    Texts that tokenizers cut into different tokens have no loss per token in common. There the loss of a whole example
    counts, over the examples that no model had to cut.

    Args:
        scores: of `scored`, for each model.
        whole: of `Examples`, for each model.
        metric: what to compare; None for the first there is.
    """
    if isinstance(scores[0][0], dict):
        named = [{name: [row[name] for row in each] for name in each[0]} for each in scores]
        return Table(named, len(scores[0]), metric or next(iter(named[0])), True)
    alike = len({tuple(count for _, count in each) for each in scores}) == 1
    if alike:
        kept = [place for place, (_, count) in enumerate(scores[0]) if count]
    else:
        kept = [place for place in range(len(scores[0])) if all(each[place] for each in whole)]
    values = []
    for each in scores:
        rows = [each[place] for place in kept]
        values.append({**text_values(rows), "example_loss": [total for total, _ in rows]} if rows else {})
    return Table(values, len(kept), metric or ("loss" if alike else "example_loss"), alike)


def mean(values: Any) -> float:
    """Of a metric: its mean over the examples, or the one number that it is."""
    return sum(values) / len(values) if isinstance(values, list) else float(values)


def interval(own: Any, first: Any) -> tuple[float, float] | None:
    """The 95 % interval of the mean difference, by a bootstrap over the pairs; None where there are no pairs.

    The draws are the same on every machine. Source: Efron, Bootstrap methods, Annals of Statistics 7, 1979.
    """
    if not isinstance(own, list) or not isinstance(first, list) or len(own) < 2:
        return None
    differences = torch.tensor(own, dtype=torch.float64) - torch.tensor(first, dtype=torch.float64)
    if not differences.isfinite().all():
        return None
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(DRAWS, dtype=torch.float64)
    for start in range(0, DRAWS, 500):  # a block at a time: there may be many examples
        drawn = torch.randint(len(differences), (500, len(differences)), generator=generator)
        sums[start : start + 500] = differences[drawn].mean(1)
    low, high = sums.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def better(metric: str) -> bool | None:
    """Whether a greater value of a metric is better; None where that is not known."""
    try:
        return direction(metric)
    except ValueError:
        return False if metric == "example_loss" else None
