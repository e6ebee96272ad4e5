"""What is measured between two logs: numbers, and the table of completions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from peft_dynamic.functional.ppo import explained_variance, position_mask
from peft_dynamic.trainers.ppo.completions import Completions

MICRO_BATCH = ("loss/policy", "loss/value", "clip_ratio", "clip_ratio_value", "approx_kl")


class Metrics:
    """Numbers to be averaged at the next log."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._sums: torch.Tensor | None = None
        self._change: torch.Tensor | None = None
        self._steps, self._skipped = 0, 0

    def add(self, mode: str, values: dict[str, float]) -> None:
        """Keep one number for each name; `mode` is "train" or "eval"."""
        for name, value in values.items():
            self._values[mode][name].append(value)

    def add_micro_batch(self, values: torch.Tensor) -> None:
        """Keep the numbers of `MICRO_BATCH`, each a part of the mean over its optimizer step's tokens."""
        self._sums = values if self._sums is None else self._sums + values
        change = values[MICRO_BATCH.index("approx_kl")]
        self._change = change if self._change is None else self._change + change

    def end_step(self) -> torch.Tensor:
        """An optimizer step is complete; returns its own `approx_kl`."""
        self._steps += 1
        change, self._change = self._change, None
        assert change is not None
        return change

    def skip_step(self, complete: bool) -> None:
        """A micro-batch is not computed; `complete` says whether an optimizer step ends with it."""
        self._skipped += complete

    def take(
        self, mode: str, total: Callable[[torch.Tensor], torch.Tensor] | None = None, processes: int = 1
    ) -> dict[str, float]:
        """The means since the last call; NaN is left out of them."""
        found = {}
        for name, values in self._values[mode].items():
            valid = [value for value in values if not math.isnan(value)]
            if valid:
                found[name] = sum(valid) / len(valid)
        self._values[mode].clear()
        if total is not None and self._sums is not None and self._steps:
            means = total(self._sums) / (processes * self._steps)
            found |= dict(zip(MICRO_BATCH, means.tolist(), strict=True))
        if total is not None:
            if self._skipped:
                found["skipped_steps"] = self._skipped / (self._skipped + self._steps)
            self._sums, self._steps, self._skipped = None, 0, 0
        return found


def reward_metrics(names: list[str], by_function: torch.Tensor, scores: torch.Tensor) -> dict[str, float]:
    """Of (completions, functions) rewards, NaN where a function has given none, and (completions,) their totals."""
    found = {"reward": scores.mean().item(), "reward_std": scores.std(unbiased=False).item()}
    for name, column in zip(names, by_function.T, strict=True):
        given = column[~column.isnan()]
        if len(given):
            found[f"rewards/{name}/mean"] = given.mean().item()
            found[f"rewards/{name}/std"] = given.std(unbiased=False).item()
    return found


def length_metrics(lengths: torch.Tensor, ended: torch.Tensor) -> dict[str, float]:
    """Of (completions,) their numbers of tokens and whether they ended, both floating-point."""
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/ended_ratio": ended.mean().item(),
    }


def rollout_metrics(
    accelerator: Any,
    names: list[str],
    by_function: torch.Tensor,
    scores: torch.Tensor,
    done: Completions,
    logprobs: torch.Tensor,
    kl: torch.Tensor | None,
    values: torch.Tensor,
    returns: torch.Tensor,
) -> dict[str, float]:
    """What is logged of a rollout, over all processes.

    "entropy" is the mean of -log pi over the sampled tokens, which estimates it, and "kl" the sum over the tokens of a
    completion, averaged over the completions.

    Args:
        accelerator: gathers from the processes.
        names: of the reward functions.
        by_function: (batch, functions) rewards.
        scores: (batch,) their weighted totals.
        done: the completions.
        logprobs: (batch, width) of the tokens.
        kl: (batch, width) estimates, or None.
        values: (batch, width).
        returns: (batch, width).
    """
    mask = position_mask(done.lengths, logprobs.shape[1])
    zeros = torch.zeros_like(scores)
    columns = [scores, done.lengths.float(), done.ended.float(), zeros if kl is None else (kl * mask).sum(1)]
    rows = accelerator.gather(torch.cat([by_function, torch.stack(columns, dim=1)], dim=1))
    tokens = torch.stack([logprobs[mask], values[mask], returns[mask], torch.ones_like(logprobs[mask])], dim=1)
    tokens = accelerator.gather(accelerator.pad_across_processes(tokens))  # padded with 0, in the last column too
    logprobs, values, returns = tokens[tokens[:, 3] > 0, :3].T
    scores, lengths, ended, kl_sum = rows[:, len(names) :].T
    found = reward_metrics(names, rows[:, : len(names)], scores) | length_metrics(lengths, ended)
    found |= {
        "entropy": -logprobs.mean().item(),
        "value/mean": values.mean().item(),
        "value/explained_variance": explained_variance(values, returns),
    }
    return found if kl is None else found | {"kl": kl_sum.mean().item()}


def sampling_metrics(accelerator: Any, sampled: torch.Tensor | None, logprobs: torch.Tensor) -> dict[str, float]:
    """How far the log-probabilities of whatever sampled the tokens are from the policy's, over all processes.

    Args:
        accelerator: gathers from the processes.
        sampled: (batch, width), NaN where it gave none; or None.
        logprobs: (batch, width) of the policy.

    Returns:
        Mean and largest difference under TRL's names; nothing where no process has any.
    """
    difference = logprobs.new_empty(0) if sampled is None else (sampled - logprobs).abs()
    difference = difference[~difference.isnan()]
    largest = difference.max() if len(difference) else difference.new_zeros(())
    gathered = accelerator.gather(
        torch.stack([difference.sum(), difference.new_tensor(len(difference)), largest])[None]
    )
    total, number = gathered[:, :2].sum(0).tolist()
    if not number:
        return {}
    name = "sampling/sampling_logp_difference"
    return {f"{name}/mean": total / number, f"{name}/max": gathered[:, 2].max().item()}


class CompletionTable:
    """Prompts, completions, rewards and what reward functions add, of all processes since the last log."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.columns: dict[str, list[Any]] = {}
        self._extra: dict[str, list[Any]] = defaultdict(list)

    def extra(self, column: str, values: list[Any]) -> None:
        """`log_extra` of the reward functions: one value per completion of the current batch."""
        self._extra[column].extend(values)

    def add(self, prompts: list, completions: list, names: list[str], rewards: torch.Tensor) -> None:
        """Append one batch."""
        rows = {"prompt": prompts, "completion": completions}
        rows |= dict(zip(names, rewards.T.tolist(), strict=True))
        rows |= {key: values for key, values in self._extra.items() if len(values) == len(prompts)}
        self._extra = defaultdict(list)
        before = len(self.columns.get("prompt", []))
        for key, values in rows.items():
            column = self.columns.setdefault(key, [None] * before)
            column += gather_object(values)

    def set_last(self, name: str, values: list[Any]) -> None:
        """Give the last rows another column."""
        column = self.columns.setdefault(name, [])
        rows = len(self.columns["prompt"])
        column += [None] * (rows - len(column) - len(values))
        column += values

    def show(self, number: int | None, step: int) -> None:
        """Print the last rows."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"Step {step}", show_lines=True)
        for name in self.columns:
            table.add_column(name)
        shown = list(zip(*self._equal().values(), strict=True))[-number if number else None :]
        for row in shown:
            table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else _text(cell) for cell in row))
        Console().print(table)

    def write(self, output_dir: str, step: int) -> None:
        """Write all rows to `output_dir`/completions, one Parquet file per log, as GRPOTrainer does."""
        from datasets import Dataset

        rows = self._equal()
        if not rows:
            return
        folder = Path(output_dir) / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        table = Dataset.from_dict({"step": [step] * len(rows["prompt"]), **rows})
        table.to_parquet(folder / f"completions_{step:05d}.parquet")

    def _equal(self) -> dict[str, list[Any]]:
        """All columns at the same length."""
        longest = max((len(column) for column in self.columns.values()), default=0)
        return {name: column + [None] * (longest - len(column)) for name, column in self.columns.items()}


def _text(cell: Any) -> str:
    from rich.markup import escape

    if isinstance(cell, list):
        cell = "\n".join(f"{message['role']}: {message['content']}" for message in cell)
    return escape(str(cell))
