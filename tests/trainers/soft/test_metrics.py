"""What is logged of a depth is the mean over all labelled tokens, however these are cut into batches."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.soft.common import rows, trainer, words

# Eight rows with one to fifteen labelled tokens.
UNEVEN = [{"prompt": words(2, i) + " ", "completion": words(1 + 2 * i, 50 + i)} for i in range(8)]
NAMES = ["exit_2_loss", "exit_4_loss", "exit_6_loss", "mean_token_accuracy"]


def logged(folder: Path, batch: int, accumulate: int, data: Any = UNEVEN, **more: Any) -> list[dict[str, float]]:
    """Of a run that changes nothing, so that each way of cutting the batch measures the same model."""
    made = trainer(
        folder,
        data=data,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.0,
        **{"max_steps": 2, "logging_steps": 1} | more,
    )
    made.train()
    return [entry for entry in made.state.log_history if "exit_2_loss" in entry]


def test_accumulation_does_not_change_what_is_logged(tmp_path: Path) -> None:
    whole = logged(tmp_path / "8", 8, 1)
    assert len(whole) == 2
    for batch, accumulate in ((1, 8), (2, 4), (4, 2)):
        for one, other in zip(logged(tmp_path / f"{batch}", batch, accumulate), whole, strict=True):
            assert [one[name] for name in NAMES] == pytest.approx([other[name] for name in NAMES], rel=1e-5)
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_log_of_several_steps_weighs_tokens_too(tmp_path: Path) -> None:
    """Both steps together, not the mean of their means; and the next log begins anew."""
    apart = logged(tmp_path / "apart", 4, 1, max_steps=4, logging_steps=2, seed=3)
    whole = logged(tmp_path / "whole", 8, 1, max_steps=2, logging_steps=1, seed=3)
    for one, other in zip(apart, whole, strict=True):
        assert [one[name] for name in NAMES] == pytest.approx([other[name] for name in NAMES], rel=1e-5)


def test_a_micro_batch_without_labels_counts_nothing(tmp_path: Path) -> None:
    made = trainer(tmp_path, data=UNEVEN, learning_rate=0.0)
    batch = next(iter(made.get_train_dataloader()))
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with torch.no_grad():
        made.model.train()
        for part in (empty, batch, empty):
            made.compute_loss(made.model, dict(part))
    found = {name: made._metrics["train"][name] for name in NAMES}
    made._metrics["train"].clear()
    with torch.no_grad():
        made.compute_loss(made.model, dict(batch))
    for name in NAMES:
        assert len(found[name]) == 1
        assert found[name] == pytest.approx(made._metrics["train"][name])
    made._metrics["train"].clear()
    with torch.no_grad():
        made.compute_loss(made.model, dict(empty))
    assert not set(NAMES) & set(made._metrics["train"])


def test_an_evaluation_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    found = []
    for size in (1, 3, 5, 8):  # the last batch is short for 3 and 5
        made = trainer(tmp_path / str(size), eval_data=UNEVEN, per_device_eval_batch_size=size)
        found.append([made.evaluate()[f"eval_{name}"] for name in NAMES])
        assert [made.evaluate()[f"eval_{name}"] for name in NAMES] == pytest.approx(found[-1])  # and again
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_training_and_evaluation_are_counted_apart(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_data=rows(3), eval_strategy="steps", eval_steps=1, learning_rate=0.0, max_steps=2)
    made.train()
    history = made.state.log_history
    evaluated = [entry["eval_exit_4_loss"] for entry in history if "eval_exit_4_loss" in entry]
    assert len(evaluated) == 2
    assert evaluated[0] == pytest.approx(evaluated[1])
    assert len([entry for entry in history if "exit_4_loss" in entry]) == 2
