"""Moved to `peft_dynamic.trainers.rewards.nlu_tasks`; the names of before are still here."""

from peft_dynamic.trainers.rewards.nlu_tasks import (
    ENTAILS,
    HIGHEST_SIMILARITY,
    INFERENCE,
    NO_YES,
    PAIR,
    PREMISE,
    TASKS,
    YES_NO,
    NLUTask,
    Row,
    record_rows,
    task_named,
)

__all__ = [
    "ENTAILS",
    "HIGHEST_SIMILARITY",
    "INFERENCE",
    "NO_YES",
    "PAIR",
    "PREMISE",
    "TASKS",
    "YES_NO",
    "NLUTask",
    "Row",
    "record_rows",
    "task_named",
]
