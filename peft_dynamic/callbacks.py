"""Callbacks of Trainer that measure an adapter's ranks, or a model's exits, at each evaluation while it is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from accelerate.state import GradientState, PartialState
from transformers import TrainerCallback

from peft_dynamic.exits import exit_at
from peft_dynamic.exits.layers import check_exit
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.reports.curve import numbers_of
from peft_dynamic.rules import is_int
from peft_dynamic.tuners.dylora import at_rank

Evaluate = Callable[[Any], Mapping[str, float]]


class _CurveCallback(TrainerCallback):
    """What both have in common: at each evaluation, the metrics at several settings of the model."""

    word: ClassVar[str]

    def __init__(
        self, points: Sequence[int], every: int = 1, evaluate: Evaluate | None = None, trainer: Any = None
    ) -> None:
        name = f"{self.word}s"
        if isinstance(points, str) or not all(is_int(point) and point >= 1 for point in points) or not len(points):
            raise ValueError(f"{name}={points!r}: must be a list of whole numbers above 0, such as [2, 8].")
        if not (is_int(every) and every >= 1):
            raise ValueError(
                f"every={every!r}: must be a whole number above 0, to measure at each so many evaluations."
            )
        self.points, self.every, self.evaluate, self.trainer = sorted({*points}), every, evaluate, trainer
        self._evaluations = 0
        self._step = -1
        self._busy = False

    def check(self, model: Any) -> None:
        """Raise unless the model has all these settings."""
        raise NotImplementedError

    def at(self, model: Any, point: int) -> AbstractContextManager[Any]:
        """The model at a setting, for a while."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.check(model)
        self._evaluations = 0
        if self.trainer is None and args.report_to:
            warnings.warn(
                f"{type(self).__name__} has no trainer, so what it measures reaches the best checkpoint and "
                f"trainer_state.json, but not {', '.join(args.report_to)}. Add it as "
                f"trainer.add_callback({type(self).__name__}({self.points}, trainer=trainer)).",
                stacklevel=2,
            )

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure, and put the values beside Trainer's own, where the best checkpoint is chosen by them."""
        if self._busy:  # an `evaluate` may call trainer.evaluate
            return
        prefix = next((name.removesuffix("_runtime") for name in metrics or () if name.endswith("_runtime")), "eval")
        if state.global_step != self._step:  # of several data sets, each evaluation of a step counts as one
            self._evaluations, self._step = self._evaluations + 1, state.global_step
        if (self._evaluations - 1) % self.every:
            return
        self.check(model)
        self._busy = True
        try:
            found: dict[str, float] = {}
            for point in self.points:
                with evaluating(model), self.at(model, point):
                    values = numbers_of(self.evaluate(model) if self.evaluate else mean_loss(model, eval_dataloader))
                found |= {f"{prefix}_{self.word}_{point}_{name}": value for name, value in values.items()}
        finally:
            self._busy = False
        if metrics is not None:
            metrics |= found
        if self.trainer is not None:
            self.trainer.log(dict(found))
        else:
            state.log_history.append({**found, "epoch": state.epoch, "step": state.global_step})


class RankCurveCallback(_CurveCallback):
    """The loss at several ranks of an adapter at each evaluation of a training: `eval_rank_8_loss` and so on.

    In loggers these are `eval/rank_8_loss`. With `metric_for_best_model="eval_rank_8_loss"` and
    `load_best_model_at_end=True` the checkpoint that is best at the rank that will be shipped is kept. Put it before an
    `EarlyStoppingCallback` that goes by such a metric. The training itself is not changed.

        settings = SFTConfig("out", eval_strategy="epoch", max_steps=1, bf16=torch.cuda.is_available())
        trainer = SFTTrainer(model, settings, train_dataset=texts, eval_dataset=texts)
        trainer.add_callback(RankCurveCallback([2, 8], trainer=trainer))

    Args:
        ranks: the ranks to measure, of a DyLoRA adapter or of a stock LoRA.
        every: measure at every so many evaluations, from the first on.
        evaluate: called as `evaluate(model)` at each rank, returns a dict from metric name to number; None for the
            mean loss over the trainer's evaluation data, by labelled tokens, over all processes. A loss to choose the
            best checkpoint by has to be called `loss`, as Trainer takes the greater value for better elsewhere.
        trainer: the trainer, through which the values reach its loggers; None where the best checkpoint and
            trainer_state.json are all that is wanted.

    Raises:
        ValueError: the arguments are not right; at the start of the training, the model has no such rank.
    """

    word = "rank"

    def __init__(
        self, ranks: Sequence[int], every: int = 1, evaluate: Evaluate | None = None, trainer: Any = None
    ) -> None:
        super().__init__(ranks, every, evaluate, trainer)

    def check(self, model: Any) -> None:
        for point in self.points:
            with at_rank(model, point):
                pass

    def at(self, model: Any, point: int) -> AbstractContextManager[Any]:
        return at_rank(model, point)


class ExitCurveCallback(_CurveCallback):
    """The loss at several exits of a model at each evaluation of a training: `eval_exit_12_loss` and so on.

    As `RankCurveCallback`, for the depths of a causal language model, whichever trainer trains it. `SoFTTrainer`
    measures the exits that it trains by itself.

    Args:
        exits: after how many layers to leave, each.
        every: as in `RankCurveCallback`.
        evaluate: as in `RankCurveCallback`.
        trainer: as in `RankCurveCallback`.

    Raises:
        ValueError: the arguments are not right; at the start of the training, the model has no such exit.
    """

    word = "exit"

    def __init__(
        self, exits: Sequence[int], every: int = 1, evaluate: Evaluate | None = None, trainer: Any = None
    ) -> None:
        super().__init__(exits, every, evaluate, trainer)

    def check(self, model: Any) -> None:
        for point in self.points:
            check_exit(model, point)

    def at(self, model: Any, point: int) -> AbstractContextManager[Any]:
        return exit_at(model, point)


def mean_loss(model: Any, batches: Any) -> dict[str, float]:
    """The mean loss over batches with labels: by labelled tokens, or by rows where a row has one label.

    Over several processes, each with its share of the batches, it is the mean over all of them. The rows with which
    accelerate fills up the last batch do not count.
    """
    place = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=place)
    for batch in batches:
        batch = {name: value.to(place) if hasattr(value, "to") else value for name, value in batch.items()}
        rows = len(batch["labels"])
        real = _real_rows(batches, rows)
        # a row at least: under FSDP every process has to take part in each pass
        batch = {name: value[: max(real, 1)] if _has_rows(value, rows) else value for name, value in batch.items()}
        loss, counted = model(**batch).loss, _counted(model, batch["labels"])
        if real and counted:
            sums += torch.stack([loss.detach().double().to(place) * counted, sums.new_tensor(counted)])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return {"loss": float(sums[0] / sums[1]) if sums[1] else float("nan")}


def _has_rows(value: Any, rows: int) -> bool:
    return torch.is_tensor(value) and value.dim() > 0 and len(value) == rows


def _counted(model: Any, labels: torch.Tensor) -> int:
    """What the model's loss is the mean of: labelled tokens, or rows."""
    if labels.dim() == 1 or labels.is_floating_point():
        return len(labels)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    shifted = inner.can_generate() and not inner.config.is_encoder_decoder  # a causal model predicts the next token
    return int((labels[:, 1:] if shifted else labels).ne(-100).sum())


def _real_rows(batches: Any, rows: int) -> int:
    """How many of this process's rows are no repetition, with which accelerate fills up the last batch."""
    state, loader = PartialState(), GradientState()
    if state.num_processes == 1 or not loader.end_of_dataloader or loader.remainder <= 0:
        return rows
    if getattr(batches, "total_batch_size", None) != rows * state.num_processes:  # one row may hold several examples
        return rows
    return min(max(loader.remainder - state.process_index * rows, 0), rows)
