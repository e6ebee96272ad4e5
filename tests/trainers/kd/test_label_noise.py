"""The labels that the teacher finds the least likely are dropped or replaced: so many as the rate says, of all rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from peft_dynamic.trainers import Distiller, KDConfig
from peft_dynamic.trainers.kd.noise import LabelNoise
from tests.trainers.kd.common import SETTINGS, assert_same, causal, classifier, rows, trainer, weights

LOSSES = [0.1, 2.0, 0.3, 5.0, 0.2, 1.0, 0.4, 0.6, 0.5, 3.0]
DROP: dict[str, Any] = {"label_noise": "drop", "noise_rate": 0.25}


@pytest.mark.parametrize(("rate", "count"), [(0.1, 1), (0.19, 1), (0.2, 2), (0.3, 3), (0.7, 7), (0.99, 9)])
def test_the_count_is_the_rate_rounded_down(rate: float, count: int) -> None:
    noise = LabelNoise("drop", rate)
    noise.look([torch.tensor(LOSSES[:4]), torch.tensor(LOSSES[4:])])
    assert noise.bound is not None
    assert sum(loss > noise.bound for loss in LOSSES) == count
    noise.look([torch.tensor([*LOSSES, 9.0, 9.0])])  # of 12; rows with one loss stay together
    assert sum(loss > noise.bound for loss in [*LOSSES, 9.0, 9.0]) in (int(rate * 12 + 1e-9), 0)


def test_which_labels_go_and_what_comes_by_hand() -> None:
    """Losses of the labels: .13, 2.13, .13, 2.13 and none; so with a bound between them the second and the fourth."""
    teacher = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0, -100])
    for kind, wanted in (("drop", [0, -100, 1, -100, -100]), ("relabel", [0, 0, 1, 1, -100])):
        noise = LabelNoise(kind, 0.5)
        noise.look([cross_entropy(teacher[:4], labels[:4], reduction="none")])
        found, suspected = noise.cleaned(labels, teacher)
        assert found.tolist() == wanted
        assert suspected.tolist() == [False, True, False, True, False]


def wrong_labels(count: int = 16) -> tuple[list[dict[str, Any]], list[int]]:
    """The teacher's own classes, but for every fourth row."""
    data = rows(count=count)
    inputs = {name: torch.tensor([row[name] for row in data]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = classifier(1, 2)(**inputs).logits
    for i, (row, one) in enumerate(zip(data, logits, strict=True)):
        row["labels"] = int(one.argmin() if i % 4 == 1 else one.argmax())
    return data, [i for i in range(count) if i % 4 == 1]


@pytest.mark.parametrize("kind", ["drop", "relabel"])
def test_an_epoch_suspects_the_wrong_labels_and_no_other(kind: str, tmp_path: Path) -> None:
    data, wrong = wrong_labels()
    teacher = classifier(1, 2)
    before = weights(teacher)
    config = KDConfig.noisy(str(tmp_path), rate=0.25, kd_weight=0.3, **SETTINGS)
    config.label_noise = kind
    made = trainer(tmp_path, teacher, train_dataset=Dataset.from_list(data), config=config)
    made.train()
    suspected = [log["suspected"] * 4 for log in made.state.log_history if "suspected" in log]
    assert len(suspected) == 4
    assert sum(suspected) == len(wrong) == 4
    assert "eval_suspected" not in made.evaluate(Dataset.from_list(data))
    assert_same(weights(teacher), before)
    # the loss, by the formula
    inputs = {name: torch.tensor([row[name] for row in data]) for name in data[0]}
    student = classifier(0)
    loss = Distiller(student, teacher, config)
    loss.look([inputs])
    with torch.no_grad():
        z, t = (each(**{**inputs, "labels": None}).logits for each in (student, teacher))
    labels = inputs["labels"].clone()
    labels[wrong] = -100 if kind == "drop" else t.argmax(1)[wrong]
    ce = cross_entropy(z, labels, reduction="none")
    kd = kl_div(log_softmax(z, 1), log_softmax(t, 1), reduction="none", log_target=True).sum(1)
    found = loss.compute(inputs)
    torch.testing.assert_close(found.loss, (0.7 * ce + 0.3 * kd).mean())
    assert found.counts["ce"] == (12 if kind == "drop" else 16)
    # evaluation is by the labels that are there
    whole = loss.compute(inputs, whole=True)
    assert whole.sums["ce"].item() == pytest.approx(cross_entropy(z, inputs["labels"], reduction="sum").item())
    assert found.sums["accuracy"] == whole.sums["accuracy"] == (z.argmax(1) == inputs["labels"]).sum()


def test_a_teacher_that_only_cleans(tmp_path: Path) -> None:
    data, wrong = wrong_labels()
    made = trainer(tmp_path, classifier(1, 2), train_dataset=Dataset.from_list(data), kd_weight=0, optim="sgd", **DROP)
    made.train()
    dropped = [{**row, "labels": -100} if i in wrong else row for i, row in enumerate(data)]
    other = trainer(tmp_path, classifier(1, 2), train_dataset=Dataset.from_list(dropped), kd_weight=1e-12, optim="sgd")
    other.train()
    for name, value in weights(made.model).items():
        torch.testing.assert_close(value, weights(other.model)[name], rtol=1e-4, atol=1e-6)


def test_parts_of_a_step_and_a_resumed_run(tmp_path: Path) -> None:
    """Eight rows in one part or in four; then a run that was stopped; the bound is one for all of them."""
    data, _ = wrong_labels()

    def made(folder: str, size: int = 8, parts: int = 1, **more: Any) -> Any:
        return trainer(
            tmp_path / folder,
            classifier(1, 2),
            classifier(0, dropout=0.5 if more else 0.0),
            train_dataset=Dataset.from_list(data),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            optim="sgd",
            **DROP,
            **more,
        )

    one, other = made("one"), made("other", 2, 4)
    for each in (one, other):
        each.train()
    for name, value in weights(one.model).items():
        torch.testing.assert_close(value, weights(other.model)[name], rtol=1e-4, atol=1e-5)
    assert one.distiller.noise.bound == pytest.approx(other.distiller.noise.bound, rel=1e-5)
    whole = made("whole", 2, 2, save_strategy="steps", save_steps=2)
    whole.train()
    again = made("again", 2, 2, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(weights(again.model), weights(whole.model))


REFUSED: dict[str, tuple[Any, str]] = {
    "another word": (lambda _: KDConfig(label_noise="keep", noise_rate=0.1), "must be 'drop' or 'relabel', or None"),
    "rate 0": (lambda _: KDConfig(label_noise="drop"), "label_noise='drop' with noise_rate=0.0: set both"),
    "a rate alone": (lambda _: KDConfig(noise_rate=0.1), "label_noise=None with noise_rate=0.1: set both"),
    "rate 1": (lambda _: KDConfig(label_noise="drop", noise_rate=1.0), "noise_rate=1.0: must be a number from 0"),
    "two judges": (lambda _: KDConfig(sample_weights="meta", **DROP), "both judge each row's label"),
    "tokens": (lambda _: Distiller(causal(0), causal(1), KDConfig(**DROP)), "of the task 'causal'"),
    "numbers": (
        lambda _: Distiller(classifier(0, classes=1), classifier(1, classes=1), KDConfig(**DROP)),
        "labels are a number",
    ),
    "no teacher": (lambda _: Distiller(classifier(0), None, KDConfig(**DROP)), "teacher is None"),
    "a list": (lambda _: Distiller(classifier(0), [classifier(1)] * 2, KDConfig(**DROP)), "teacher is a list"),
    "ema": (lambda _: Distiller(classifier(0), "ema", KDConfig(**DROP)), "teacher is one that moves"),
    "not looked": (
        lambda _: Distiller(classifier(0), classifier(1), KDConfig(**DROP)).compute(
            {name: torch.tensor([rows()[0][name]]) for name in rows()[0]}
        ),
        "distiller.look",
    ),
    "a stream": (
        lambda path: trainer(
            path, classifier(1), train_dataset=Dataset.from_list(rows()).to_iterable_dataset(), **DROP
        ),
        "label_noise='drop' chooses among all training rows",
    ),
    "less than a row": (
        lambda path: trainer(path, classifier(1), label_noise="drop", noise_rate=0.01).train(),
        "noise_rate=0.01 of 16 rows with a label is 0 rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    run, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        run(tmp_path)
