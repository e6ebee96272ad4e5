"""One training run of the command, its arguments checked: what `train` hands to `_run`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_dynamic.cli._data import Example
from peft_dynamic.cli._interrupt import Interruption


@dataclass
class Job:
    """One training run, checked."""

    model: str
    data: str
    eval_data: str | None  # None: held out of `data`
    examples: list[Example]
    held_out: list[Example]
    unused: list[str]  # columns
    config: Any  # a DyLoRAConfig
    four_bit: bool
    steps: int  # -1: as many as the epochs have
    epochs: float
    batch_size: int
    learning_rate: float
    max_length: int
    seed: int
    tolerance: float
    max_minutes: float | None
    save_steps: int | None  # None: every fifth of the run, until it is through
    output: Path
    started: float  # by time.monotonic
    resume: bool = False
    interruption: Interruption = field(default_factory=Interruption)
