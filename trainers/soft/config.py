"""Settings of a SoFT run: those of `trl.SFTConfig`, and which exits are trained how."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from peft_dynamic._extras import how_to_install
from peft_dynamic.exits.layers import PAPER_EXITS, evenly_spaced
from peft_dynamic.functional.schedule import moving
from peft_dynamic.rules import is_int

try:
    from trl import SFTConfig
except ImportError as error:
    raise ImportError(f"SoFTConfig needs TRL. {how_to_install('trl', 'trl>=1.16', 'datasets')}") from error


# The annotations of fields are read by transformers' and TRL's parsers, which need them as objects: the parser of a
# union takes the member after the first, so a string comes from the command line, and anything from YAML or Python.
@dataclass
class SoFTConfig(SFTConfig):
    """All of `trl.SFTConfig`, and the exits.

    An exit k is the model left after its first k layers, with its own final norm and head. The loss is

        L = sum_{k in S} w_k L_k / sum_{k in S} w_k

    with L_k the loss that `SFTTrainer` would compute of the model cut to k layers, and S the exits of the step. S has
    all exits, as in SoFT, or a draw of them, as in the original SortedNet.

    Args:
        exits: depths to train, in layers, the full depth among them; or how many, evenly spaced from 3/10 of the depth
            to all of it. None for eight: of 40 layers the paper's 12, 16, ..., 40. A model of less than ten layers has
            fewer. On the command line "8", or "12,16,20".
        exit_weights: w_k, one positive number per exit in increasing order of depth; None for the paper's equal ones.
        exits_per_step: None to train all exits in each step; k to train the full depth and k others. They are drawn
            for each optimizer step from `seed` and the step's number: the same on all processes and after a resume.
        exit_kd: lambda, 0 to 1: an exit's loss becomes (1 - lambda) L_k + lambda T^2 KL(full depth || exit k) per
            token, in the same forward pass; the full depth learns from the labels alone. A number, or a schedule's text
            as in `KDConfig`. 0 for SoFT as in the paper.
        exit_kd_temperature: T of that divergence; moves as well.
        eval_exits: the depths to evaluate, with `eval_loss` their plain mean; None for the trained ones, with their
            weights.

    Raises:
        ValueError, TypeError: a value has no meaning, or is not supported with exits (`loss_type="dft"`,
            `label_smoothing_factor`).

    Source: P. Kavehzadeh, M. Valipour, M. Tahaei, A. Ghodsi, B. Chen, M. Rezagholizadeh: Sorted LLaMA: Unlocking the
    Potential of Intermediate Layers of Large Language Models for Dynamic Inference, Findings of EACL 2024,
    arXiv 2309.08968, equation (1).
    """

    exits: list[int] | str | int | None = field(
        default=None,
        metadata={
            "help": "Depths to train, in layers, such as '12,16,20', the full depth among them; or a count of evenly "
            "spaced ones, such as '8'. None for eight, as in the paper."
        },
    )
    exit_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each exit's loss, shallowest first. None for equal weights, as in the paper."},
    )
    exits_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Train the full depth and so many other exits in each step, drawn at random. None for all exits."
        },
    )
    eval_exits: list[int] | None = field(
        default=None,
        metadata={"help": "Depths to evaluate, in layers. None for the trained exits."},
    )

    exit_kd: float | str | None = field(
        default=0.0,
        metadata={
            "help": "How much the shallower exits learn from the full depth in place of the labels, 0 to 1: a number, "
            "or a schedule such as '0:0 1:0.5'. 0 for the paper's SoFT."
        },
    )
    exit_kd_temperature: float | str | None = field(
        default=1.0, metadata={"help": "Temperature of what exit_kd compares: a number or a schedule."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.exit_kd = moving("exit_kd", self.exit_kd, "from 0 to 1", lambda value: 0 <= value <= 1)
        self.exit_kd_temperature = moving(
            "exit_kd_temperature", self.exit_kd_temperature, "greater than 0", lambda value: value > 0
        )
        if isinstance(self.exits, str):
            self.exits = _parsed(self.exits)
        if isinstance(self.exits, int) and not isinstance(self.exits, bool):
            if self.exits < 1:
                raise ValueError(f"exits={self.exits}: a count must be at least 1; the paper has {PAPER_EXITS} exits.")
        elif self.exits is not None:
            self.exits = _depths("exits", self.exits)
        if self.eval_exits is not None:
            self.eval_exits = _depths("eval_exits", self.eval_exits)
        self._check_weights()
        if isinstance(self.exits_per_step, bool) or not isinstance(self.exits_per_step, int | None):
            raise TypeError(f"exits_per_step={self.exits_per_step!r}: must be an integer, or None for all exits.")
        if self.exits_per_step is not None and self.exits_per_step < 1:
            raise ValueError(f"exits_per_step={self.exits_per_step}: must be at least 1, or None for all exits.")
        if self.exits is not None:
            self._check_count(len(self.exits) if isinstance(self.exits, list) else int(self.exits))
        if self.loss_type == "dft":
            raise ValueError("loss_type='dft': SoFT is defined with the likelihood of each exit; use loss_type='nll'.")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}: it needs the logits of every exit, which are "
                "never held; set it to 0."
            )

    def _check_weights(self) -> None:
        weights = self.exit_weights
        if weights is None:
            return
        numbers = isinstance(weights, Sequence) and not isinstance(weights, str | bytes)
        if not numbers or not weights or any(isinstance(w, bool) or not isinstance(w, Real) for w in weights):
            raise TypeError(f"exit_weights={weights!r}: must be a list of numbers, one per exit.")
        if any(not (math.isfinite(w) and w > 0) for w in weights):
            raise ValueError(
                f"exit_weights={weights}: each must be positive and finite. An exit of weight 0 would not be trained: "
                "leave it out of exits."
            )
        self.exit_weights = [float(w) for w in weights]

    def _check_count(self, count: int) -> None:
        weights, chosen = self.exit_weights, self.exits_per_step
        if weights is not None and len(weights) != count:
            raise ValueError(f"exit_weights={weights}: must have one number for each of the {count} exits.")
        if chosen is not None and not 1 <= chosen < count:
            raise ValueError(
                f"exits_per_step={chosen}: besides the full depth there are {count - 1} exits to draw from, so it must "
                f"be from 1 to {count - 1}, or None for all of them."
            )

    def trained_exits(self, depth: int) -> list[int]:
        """The exits of a model of `depth` layers, increasing.

        Raises:
            ValueError: they do not fit the model.
        """
        if isinstance(self.exits, list):
            exits = self.exits
            _check_depths("exits", exits, depth)
            if exits[-1] != depth:
                raise ValueError(
                    f"exits={exits}: the full depth, {depth}, must be among them; add it. (A number of evenly spaced "
                    f"exits is written exits={exits[0]}, not [{exits[0]}].)"
                )
        else:
            count = PAPER_EXITS if self.exits is None else int(self.exits)
            exits = evenly_spaced(count, depth)
            if self.exits is not None and len(exits) < count:
                raise ValueError(
                    f"exits={count}: a model of {depth} layers has only {len(exits)} evenly spaced exits of its upper "
                    f"7/10, {exits}; ask for so many, or list the depths."
                )
        self._check_count(len(exits))
        return exits

    def evaluated_exits(self, depth: int) -> list[int]:
        """The exits to evaluate of a model of `depth` layers, increasing.

        Raises:
            ValueError: they do not fit the model.
        """
        if self.eval_exits is None:
            return self.trained_exits(depth)
        _check_depths("eval_exits", self.eval_exits, depth)
        return self.eval_exits


def draw_exits(exits: list[int], others: int | None, seed: int, step: int) -> list[int]:
    """The exits of optimizer step `step`: a pure function, so that processes, micro-batches and resumed runs agree."""
    if others is None:
        return exits
    return [*sorted(random.Random(f"{seed}/{step}").sample(exits[:-1], others)), exits[-1]]


def _parsed(text: str) -> list[int] | int:
    try:
        numbers = [int(part) for part in text.strip("[] ").replace(",", " ").split()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"exits={text!r}: must be a count such as '8' or depths such as '12,16,20'.")
    return numbers if len(numbers) > 1 or not text.strip().isdigit() else numbers[0]


def _depths(name: str, value: Any) -> list[int]:
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not listed or not all(map(is_int, value)):
        raise TypeError(f"{name}={value!r}: must be a list of depths in layers, such as [12, 16, 20].")
    if not value or len(set(value)) < len(value) or min(value) < 1:
        raise ValueError(f"{name}={list(value)}: must be different depths of at least 1 layer, such as [12, 16, 20].")
    return sorted(map(int, value))


def _check_depths(name: str, depths: list[int], depth: int) -> None:
    if depths[-1] > depth:
        raise ValueError(f"{name}={depths}: the model has {depth} layers, so none of them can be deeper than {depth}.")
