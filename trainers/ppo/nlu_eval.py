"""Moved to `peft_dynamic.trainers.rewards.nlu_eval`; the names of before are still here."""

from peft_dynamic.trainers.rewards.nlu_eval import METRICS, Metric, Numbers, Predictions, evaluate_nlu, nlu_metrics

__all__ = ["METRICS", "Metric", "Numbers", "Predictions", "evaluate_nlu", "nlu_metrics"]
