"""RW-KD's weights are those of its derivative of a derivative, and the same however a step is cut or resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid
from transformers import BertForSequenceClassification

from peft_dynamic.functional.sample_weights import shares, slopes
from peft_dynamic.trainers import Distiller, KDConfig
from tests.trainers.kd.common import SETTINGS, assert_same, batch, causal, classifier, rows, trainer, weights


def test_one_parameter_by_hand() -> None:
    """theta = 0, x = 1, the teacher is .9 sure of class 1; the other row has label 1.

    Gradients of (CE, KD) are (-.5, -.4) for label 1 and (.5, -.4) for label 0; of the other row -.9. So u is (.45, .36)
    and (-.45, .36): lambda is .36 / .81, and nearly 1 for the wrong label.
    """
    theta = torch.zeros(1, dtype=torch.float64)

    def losses() -> torch.Tensor:
        ce = torch.cat([-logsigmoid(theta), -logsigmoid(-theta)])
        kd = -(0.9 * logsigmoid(theta) + 0.1 * logsigmoid(-theta)).expand(2)
        return torch.stack([ce, kd])

    found = slopes(losses, [theta], [torch.tensor([-0.9], dtype=torch.float64)])
    torch.testing.assert_close(found, torch.tensor([[0.45, -0.45], [0.36, 0.36]], dtype=torch.float64))
    assert theta.item() == 0
    share = shares(*found)
    assert share[0].item() == pytest.approx(0.4444, abs=1e-4)
    assert 1 - share[1].item() == pytest.approx(1e-8 / 0.36, rel=1e-3)
    assert shares(torch.tensor([-1.0]), torch.tensor([-2.0])).item() == 0.5  # neither helps
    assert slopes(losses, [theta], [torch.zeros(1, dtype=torch.float64)]).abs().max() == 0


def pair(student: Any, teacher: Any, inputs: dict[str, torch.Tensor], values: Any = None) -> torch.Tensor:
    bare = {name: value for name, value in inputs.items() if name != "labels"}
    z = student(**bare).logits if values is None else functional_call(student, values, (), bare).logits
    t = teacher(**bare).logits.detach()
    kd = kl_div(log_softmax(z / 2, 1), log_softmax(t / 2, 1), reduction="none", log_target=True).sum(1) * 4
    return torch.stack([cross_entropy(z, inputs["labels"], reduction="none"), kd])


def halves(count: int = 16) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    whole = batch(count=count)
    first, second = ({name: value[part] for name, value in whole.items()} for part in (slice(0, 8), slice(8, count)))
    return first, second


def test_it_is_the_derivative_of_a_derivative() -> None:
    """The published way: a virtual step with weights eps, and the other rows' loss after it, by eps."""
    student, teacher = (classifier(seed, 2, attn_implementation="eager").double() for seed in (0, 1))
    inputs, others = halves()
    values = dict(student.named_parameters())
    eps = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    trial = (eps * pair(student, teacher, inputs)).sum()
    gradients = torch.autograd.grad(trial, list(values.values()), create_graph=True, materialize_grads=True)
    moved = {name: p - g for (name, p), g in zip(values.items(), gradients, strict=True)}
    (after,) = torch.autograd.grad(pair(student, teacher, others, moved).sum(0).mean(), eps)
    wanted = shares(*(-after))
    distiller = Distiller(student, teacher, KDConfig(temperature=2.0, sample_weights="meta"))
    distiller.aim([others])
    found = distiller.compute(inputs)
    ce, kd = pair(student, teacher, inputs)
    torch.testing.assert_close(found.loss, ((1 - wanted) * ce + wanted * kd).mean(), rtol=1e-6, atol=0)
    assert distiller.meta is not None
    share = distiller.meta.shares(lambda: pair(student, teacher, inputs))
    torch.testing.assert_close(share, wanted, rtol=1e-6, atol=1e-12)
    assert ((wanted > 0.01) & (wanted < 0.99)).sum() + (wanted == 0.5).sum() > 2
    assert len(set(wanted.tolist())) > 2


def test_it_runs_on_fused_attention_and_only_what_is_trained_moves() -> None:
    model = get_peft_model(
        classifier(0, 2, dropout=0.5, attn_implementation="sdpa"),
        LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", lora_dropout=0.5, init_lora_weights=False),
    )
    model.train()
    inputs, others = halves()
    teacher = classifier(1, 2)
    before, taught = weights(model), weights(teacher)
    distiller = Distiller(model, teacher, KDConfig(sample_weights="meta"))
    state = torch.get_rng_state()
    distiller.aim([others])
    assert distiller.meta is not None
    one, other = (distiller.meta.shares(lambda: pair(model, teacher, inputs)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn
    assert torch.equal(one, other)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    distiller.compute(inputs).loss.backward()
    broken = {**inputs, "input_ids": torch.full((8, 6), 10**6)}

    def fails() -> torch.Tensor:
        return pair(model, teacher, broken)

    with pytest.raises(IndexError):
        distiller.meta.shares(fails)
    with pytest.raises(IndexError):
        distiller.meta.aim([fails])
    assert_same(weights(model), before)
    assert_same(weights(teacher), taught)
    assert all(module.training for module in model.modules())


def test_the_rows_set_aside_are_not_trained_on(tmp_path: Path) -> None:
    data = Dataset.from_list([{**row, "input_ids": [i, *row["input_ids"][1:]]} for i, row in enumerate(rows())])
    made = trainer(tmp_path, classifier(1, 2), train_dataset=data, sample_weights="meta", meta_fraction=0.25)
    aside, kept = ([ids[0] for ids in part["input_ids"]] for part in (made._meta_rows, made.train_dataset))
    assert len(aside) == 4
    assert sorted(aside + kept) == list(range(16))
    again = trainer(tmp_path, classifier(1, 2), train_dataset=data, sample_weights="meta", meta_fraction=0.25)
    assert [ids[0] for ids in again._meta_rows["input_ids"]] == aside
    made.train()
    logs = [log for log in made.state.log_history if "sample_weight" in log]
    assert len(logs) == 4
    assert all(0 < log["sample_weight"] < 1 and 0 <= log["undecided"] <= 1 for log in logs)
    assert "kd_weight" not in logs[0]
    found = made.evaluate(data)
    assert "eval_sample_weight" not in found
    torch_rows = list(data.with_format(None))
    other = trainer(tmp_path, classifier(1, 2), train_dataset=torch_rows, sample_weights="meta", meta_fraction=0.25)
    other.train()
    assert_same(weights(other.model), weights(made.model))


def test_the_rows_that_serve_a_step_are_drawn_by_its_number(tmp_path: Path) -> None:
    data = Dataset.from_list(rows(count=32))
    made = trainer(tmp_path, classifier(1, 2), train_dataset=data, sample_weights="meta", meta_fraction=0.5)
    drawn = []
    for seed in (0, 1):  # whatever else has been drawn
        torch.manual_seed(seed)
        made.state.global_step = 3
        drawn.append(made._meta_places())
    made.state.global_step = 4
    assert len(set(drawn[0])) == 4
    assert drawn[0] == drawn[1] != made._meta_places()


@pytest.mark.parametrize("classes", [3, 1])
def test_eight_rows_in_one_part_or_in_four(classes: int, tmp_path: Path) -> None:
    trained = []
    data = [{**row, "labels": float(row["labels"]) if classes == 1 else row["labels"]} for row in rows(count=24)]
    for size, parts in ((8, 1), (2, 4)):
        made = trainer(
            tmp_path,
            classifier(1, 2, classes),
            classifier(0, classes=classes),
            train_dataset=Dataset.from_list(data),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            optim="sgd",
            config=None,
            max_steps=2,
            sample_weights="meta",
            meta_fraction=0.4,
        )
        made.train()
        trained.append(weights(made.model))
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("teacher", ["model", "ema"])
def test_a_resumed_run_is_the_uninterrupted_one(teacher: str, tmp_path: Path) -> None:
    def made(folder: str, **more: Any) -> Any:
        who = classifier(1, 2) if teacher == "model" else teacher
        config = KDConfig.rw_kd(
            str(tmp_path / folder),
            meta_fraction=0.3,
            temperature="0:3 1:1",
            ema_decay=0.5,
            **{**SETTINGS, "max_steps": 6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, **more},
        )
        return trainer(tmp_path, who, classifier(0, dropout=0.5), config=config)

    whole = made("whole", save_strategy="steps", save_steps=3)
    whole.train()
    again = made("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(weights(again.model), weights(whole.model))


def test_rows_without_labels_follow_the_teacher() -> None:
    student, teacher = classifier(0), classifier(1, 2)
    inputs, others = halves()
    inputs["labels"][2:] = -100
    distiller = Distiller(student, teacher, KDConfig(sample_weights="meta"))
    distiller.aim([others])
    assert distiller.meta is not None
    share = distiller.meta.shares(distiller._pair(inputs, distiller._taught(inputs, 0.0), 0.0))
    share[2:] = 1.0
    z, t = (each(**{**inputs, "labels": None}).logits for each in (student, teacher))
    kd = kl_div(log_softmax(z, 1), log_softmax(t, 1), reduction="none", log_target=True).sum(1)
    ce = cross_entropy(z, inputs["labels"], reduction="none")
    torch.testing.assert_close(distiller(inputs), ((1 - share) * ce + share * kd).mean())


class Drawing(BertForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = torch.dropout(found.logits, 0.5, train=True)
        return found


def drawing() -> None:
    distiller = Distiller(Drawing(classifier(0).config), classifier(1), KDConfig(sample_weights="meta"))
    distiller.aim([batch()])


META: dict[str, Any] = {"sample_weights": "meta"}
STREAM = Dataset.from_list(rows()).to_iterable_dataset()
REFUSED: dict[str, tuple[Any, str]] = {
    "another word": (lambda _: KDConfig(sample_weights="confidence"), "sample_weights='confidence': must be 'meta'"),
    "a weight too": (lambda _: KDConfig(kd_weight=0.3, **META), "kd_weight=0.3: sample_weights='meta' finds"),
    "a share alone": (lambda _: KDConfig(meta_fraction=0.2), "meta_fraction=0.2 is for sample_weights"),
    "all rows": (lambda _: KDConfig(meta_fraction=1.0, **META), "meta_fraction=1.0: must be a number greater than 0"),
    "half precision": (lambda _: KDConfig(use_cpu=True, bf16=True, **META), "Set bf16=False"),
    "half weights": (
        lambda _: Distiller(classifier(0).to(torch.bfloat16), classifier(1), KDConfig(**META)),
        "Load the student in float32",
    ),
    "tokens": (lambda _: Distiller(causal(0), causal(1), KDConfig(**META)), "task is 'causal'"),
    "no teacher": (lambda _: Distiller(classifier(0), None, KDConfig(**META)), "and teacher is None"),
    "a formula": (lambda _: Distiller(classifier(0), "manual", KDConfig(**META)), "and teacher is 'manual'"),
    "no rows yet": (lambda _: Distiller(classifier(0), classifier(1), KDConfig(**META))(batch()), "distiller.aim"),
    "few rows": (
        lambda path: trainer(path, classifier(1), train_dataset=Dataset.from_list(rows(count=5)), **META),
        "meta_fraction=0.1 of 5 training rows is 0",
    ),
    "a stream": (
        lambda path: trainer(
            path, classifier(1), train_dataset=Dataset.from_list(rows()).to_iterable_dataset(), **META
        ),
        "sample_weights='meta' chooses among all training rows",
    ),
    "draws in eval mode": (lambda _: drawing(), "gives other losses for one batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    run, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        run(tmp_path)
