"""What is measured between two logs: numbers, and the table of completions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

MICRO_BATCH = ("loss/policy", "loss/value", "clip_ratio", "clip_ratio_value", "approx_kl")


class Metrics:
    """Numbers to be averaged at the next log."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._sums: torch.Tensor | None = None
        self._steps = 0

    def add(self, mode: str, values: dict[str, float]) -> None:
        """Keep one number for each name; `mode` is "train" or "eval"."""
        for name, value in values.items():
            self._values[mode][name].append(value)

    def add_micro_batch(self, values: torch.Tensor) -> None:
        """Keep the numbers of `MICRO_BATCH`, each a part of the mean over its optimizer step's tokens."""
        self._sums = values if self._sums is None else self._sums + values

    def end_step(self) -> None:
        """An optimizer step is complete."""
        self._steps += 1

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
            self._sums, self._steps = None, 0
        return found


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
