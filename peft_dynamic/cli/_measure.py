"""The loss on held-out rows at each rank, row by row, and what it says about the ranks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

from peft_dynamic.cli._budget import Budget
from peft_dynamic.cli._load import autocast, device
from peft_dynamic.ranks import RankCurve, RankRow

Batch = dict[str, torch.Tensor]


def batches(
    encoded: Sequence[dict[str, Any]], tokenizer: Any, size: int, seed: int, collator: Any = None
) -> list[Batch]:
    """Padded batches, rows of a length together, in a random order: any number of the first ones is a fair sample."""
    made = [batch for _, batch in placed_batches(encoded, tokenizer, size, collator)]
    random.Random(seed).shuffle(made)
    return made


def placed_batches(
    encoded: Sequence[dict[str, Any]], tokenizer: Any, size: int, collator: Any = None
) -> list[tuple[list[int], Batch]]:
    """Padded batches, rows of a length together, each with its rows' places in `encoded`."""
    collator = collator or DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    ordered = sorted(range(len(encoded)), key=lambda place: len(encoded[place]["input_ids"]))
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [(part, dict(collator([encoded[place] for place in part]))) for part in parts]


def row_losses(model: Any, batch: Batch, dtype: torch.dtype) -> list[tuple[float, int]]:
    """For each row the sum of its tokens' losses, and the number of these tokens."""
    logits, labels = _logits(model, batch, dtype)
    # the first token of a row is predicted from nothing
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    counts = (labels[:, 1:] != -100).sum(1)
    return list(zip(losses.sum(1).tolist(), counts.tolist(), strict=True))


def _logits(model: Any, batch: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's logits in float32, and its labels beside them."""
    inputs = {key: value.to(device(model)) for key, value in batch.items() if key != "labels"}
    with torch.no_grad(), autocast(model, dtype):
        logits = model(**inputs).logits
    return logits.float(), batch["labels"].to(device(model))


def text_metrics(model: Any, batches: list[Batch], dtype: torch.dtype) -> dict[str, Any]:
    """The loss per learnt token, as a value for each row, and its exponential, the perplexity.

    With L the loss per token over all rows, t_i and n_i a row's sum of losses and its tokens, and n their mean, a row's
    value is L + (t_i - L n_i) / n. The mean of these is L, and the standard errors that are computed from them, of L
    and of differences between ranks, are those of a ratio, as in `HeldOut.gain`.
    """
    return text_values([row for batch in batches for row in row_losses(model, batch, dtype)])


def text_values(rows: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """The same of rows, each with the sum of its tokens' losses and their number."""
    tokens = sum(count for _, count in rows) / len(rows)
    loss = sum(total for total, _ in rows) / len(rows) / tokens
    values = [loss + (total - loss * count) / tokens for total, count in rows]
    return {**_by_row(loss=values), "perplexity": perplexity(loss)}


def label_metrics(model: Any, batches: list[Batch], dtype: torch.dtype) -> dict[str, Any]:
    """Accuracy and loss of a classifier, a value for each row; of a model with one output the squared error."""
    values: dict[str, list[float]] = {}
    for batch in batches:
        for name, found in label_values(model, batch, dtype).items():
            values.setdefault(name, []).extend(found)
    return _by_row(**values)


def label_values(model: Any, batch: Batch, dtype: torch.dtype) -> dict[str, list[float]]:
    """The same of one batch."""
    logits, labels = _logits(model, batch, dtype)
    if logits.shape[-1] == 1:
        return {"mse": (logits[:, 0] - labels.float()).square().tolist()}
    right = (logits.argmax(-1) == labels).double().tolist()
    return {"accuracy": right, "loss": torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()}


def _by_row(**values: list[float]) -> dict[str, Any]:
    """Of a single row the number: a standard error needs two."""
    return {name: row if len(row) > 1 else row[0] for name, row in values.items()}


def perplexity(loss: float) -> float:
    """The exponential of a loss; infinite where no float can hold it."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass
class HeldOut:
    """The rows' losses at each rank, over as many batches as there is time for at all of them.

    Each rank has its share of what is left of the time, and all are compared over the batches that each of them saw.

    Args:
        batches: the held-out rows.
        ranks: the ranks, in the order in which they are measured; the base model, None, comes after them.
        budget: the time for all.
        reserve: seconds to keep for what comes after.
        dtype: the dtype to compute in.
    """

    batches: list[Batch]
    ranks: list[int]
    budget: Budget
    reserve: float
    dtype: torch.dtype
    seen: dict[int | None, list[list[tuple[float, int]]]] = field(default_factory=dict)

    def __call__(self, model: Any) -> dict[str, float]:
        """Measure the next rank: what `rank_curve` calls."""
        order = [*self.ranks, None]
        now = order[len(self.seen)]
        to_come = len(order) - len(self.seen)
        end = self.budget.clock() + (self.budget.left() - self.reserve) / to_come
        losses: list[list[tuple[float, int]]] = []
        for batch in self.batches[: self.common or None]:
            losses.append(row_losses(model, batch, self.dtype))
            if self.budget.clock() >= end:
                break
        self.seen[now] = losses
        return self.metrics(now)

    @property
    def common(self) -> int:
        """The number of batches that every rank so far saw."""
        return min((len(losses) for losses in self.seen.values()), default=0)

    @property
    def rows(self) -> int:
        """The number of rows in them."""
        return sum(len(batch["labels"]) for batch in self.batches[: self.common])

    def rows_at(self, rank: int | None) -> list[tuple[float, int]]:
        """The losses at a rank over the rows that all ranks saw."""
        return [row for losses in self.seen[rank][: self.common] for row in losses]

    def metrics(self, rank: int | None) -> dict[str, float]:
        """Mean loss per learnt token, and its exponential, the perplexity."""
        rows = self.rows_at(rank)
        mean = sum(total for total, _ in rows) / sum(count for _, count in rows)
        return {"loss": mean, "perplexity": perplexity(mean)}

    def curve(self) -> RankCurve:
        """The curve so far: the base model first, if it was measured, and the ranks."""
        order = sorted(self.seen, key=lambda rank: 0 if rank is None else rank)
        return RankCurve([RankRow(rank, self.metrics(rank)) for rank in order])

    def gain(self, rank: int) -> tuple[float, float]:
        """How far the loss at a rank is below the base model's, and the standard error of that over the rows.

        Both are per token: with d_i and n_i a row's difference and tokens, g = sum d_i / sum n_i, and its variance is
        n / (n - 1) sum (d_i - g n_i)^2 / (sum n_i)^2, that of a ratio. NaN for a single row.
        """
        pairs = zip(self.rows_at(None), self.rows_at(rank), strict=True)
        rows = [(base - loss, count) for (base, count), (loss, _) in pairs]
        tokens, n = sum(count for _, count in rows), len(rows)
        gain = sum(difference for difference, _ in rows) / tokens
        if n < 2:
            return gain, math.nan
        spread = sum((difference - gain * count) ** 2 for difference, count in rows)
        return gain, math.sqrt(n / (n - 1) * spread) / tokens


@dataclass
class Choice:
    """The rank to keep, if any, and why.

    Attributes:
        rank: the smallest rank with nearly all of the best rank's gain; None if nothing was learnt.
        best: the rank with the greatest gain.
        gains: rank -> (gain over the base model, its standard error).
    """

    rank: int | None
    best: int
    gains: dict[int, tuple[float, float]]

    @property
    def sentence(self) -> str:
        """What to tell."""
        if self.rank is None:
            return (
                f"Nothing was learnt: the best rank, {self.best}, is {self.described(self.best)} below the base "
                "model's loss, which is not more than twice its standard error. No rank is recommended or exported. "
                "Train for more --steps, at another --learning-rate, or hold out more rows."
            )
        why = "the best" if self.rank == self.best else f"with {self.share(self.rank)} of the gain of rank {self.best}"
        return f"Recommended: rank {self.rank}, {why}: its loss is {self.described(self.rank)} below the base model's."

    def described(self, rank: int) -> str:
        """A gain with its standard error."""
        gain, error = self.gains[rank]
        return f"{gain:.4f} (one held-out row: no standard error)" if math.isnan(error) else f"{gain:.4f} ± {error:.4f}"

    def share(self, rank: int) -> str:
        """Of the best rank's gain, in per cent."""
        return "" if self.rank is None else f"{100 * self.gains[rank][0] / self.gains[self.best][0]:.1f} %"


def choose(held_out: HeldOut, tolerance: float) -> Choice:
    """The smallest rank that has all but `tolerance` of the best rank's gain over the base model.

    Nothing was learnt if that gain is not above 0 by more than twice its standard error over the rows.
    """
    gains = {rank: held_out.gain(rank) for rank in held_out.ranks}
    finite = {rank: gain for rank, (gain, _) in gains.items() if math.isfinite(gain)}
    best = max(finite, key=lambda rank: (finite[rank], -rank)) if finite else held_out.ranks[0]
    gain, error = gains[best]
    learnt = finite and gain > (0 if math.isnan(error) else 2 * error)
    rank = held_out.curve().recommend(tolerance, "loss") if learnt else None
    return Choice(rank, best, gains)
