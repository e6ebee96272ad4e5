"""Moved to `peft_dynamic.density.trainer_step`; the names of before are still here."""

from peft_dynamic.density.trainer_step import METRIC, MULTIPLIED, TrainingStep, current_step, logger, watch_trainers

__all__ = ["METRIC", "MULTIPLIED", "TrainingStep", "current_step", "logger", "watch_trainers"]
