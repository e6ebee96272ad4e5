"""KDTrainer trains on the loss that it says, for every task, and changes nothing but the student."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss
from transformers import Trainer, TrainingArguments, default_data_collator

from peft_dynamic.functional.schedule import Schedule
from peft_dynamic.trainers import Distiller, KDConfig, KDTrainer
from tests.trainers.kd.common import (
    MODELS,
    SETTINGS,
    assert_same,
    batch,
    classifier,
    rows,
    trainer,
    weights,
)

TASKS = list(MODELS)


def labelled(task: str, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that count, cut out without the code under test."""
    if task == "sequence":
        return logits, labels
    if task == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != -100
    return logits[keep], labels[keep]


@pytest.mark.parametrize("task", TASKS)
def test_loss_and_gradients_are_the_formulas(task: str) -> None:
    student, teacher, inputs = MODELS[task](0), MODELS[task](1, 2), batch(task)
    config = KDConfig(kd_weight=0.3, temperature=2.0, teacher_scale=0.5)
    loss = Distiller(student, teacher, config)(inputs)
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    z, y = labelled(task, student(**inputs).logits, inputs["labels"])
    t, _ = labelled(task, teacher(**inputs).logits.detach(), inputs["labels"])
    kd = kl_div(log_softmax(z / 2, 1), log_softmax(t / 4, 1), reduction="batchmean", log_target=True) * 4
    wanted = 0.7 * cross_entropy(z, y) + 0.3 * kd
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for name, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_without_a_teacher_it_is_trainer(task: str, tmp_path: Path) -> None:
    ours = trainer(tmp_path, task=task, gradient_accumulation_steps=2)
    ours.train()
    stock = Trainer(
        MODELS[task](0),
        TrainingArguments(str(tmp_path), **SETTINGS, gradient_accumulation_steps=2),
        train_dataset=Dataset.from_list(rows(task)),
        data_collator=default_data_collator,
    )
    if task != "causal":
        stock.model_accepts_loss_kwargs = False  # else transformers counts these models' losses once per part
    stock.train()
    for name, value in weights(ours.model).items():
        torch.testing.assert_close(value, weights(stock.model)[name], rtol=1e-4, atol=1e-5)


def test_smoothing_is_trainers_label_smoothing(tmp_path: Path) -> None:
    ours = trainer(tmp_path, "smoothing", smoothing=0.2)
    ours.train()
    stock = Trainer(
        classifier(0),
        TrainingArguments(str(tmp_path), **SETTINGS, label_smoothing_factor=0.2),
        train_dataset=Dataset.from_list(rows()),
        data_collator=default_data_collator,
    )
    stock.train()
    for name, value in weights(ours.model).items():
        torch.testing.assert_close(value, weights(stock.model)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["sequence", "causal"])
def test_eight_rows_in_one_part_or_in_four(task: str, tmp_path: Path) -> None:
    data = rows(task)
    if task == "causal":
        for i, row in enumerate(data):  # parts with different numbers of tokens
            row["labels"] = [-100] * (i % 4 + 1) + row["labels"][i % 4 + 1 :]
    trained = []
    for size, parts in ((8, 1), (2, 4)):
        made = trainer(
            tmp_path,
            MODELS[task](1, 2),
            task=task,
            train_dataset=Dataset.from_list(data),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            kd_weight="0:1 1:0.2",
            optim="sgd",  # Adam would make steps of the rounding in a key's bias, whose gradient is 0
        )
        made.train()
        trained.append(weights(made.model))
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-4, atol=1e-5)


def test_rows_with_and_without_labels_in_parts(tmp_path: Path) -> None:
    """The loss of a step is the mean over all its rows, whatever part of them has labels."""
    data = rows()
    for row in data[::3]:
        row["labels"] = -100
    made = trainer(
        tmp_path,
        classifier(1, 2),
        train_dataset=Dataset.from_list(data),
        gradient_accumulation_steps=4,
        max_steps=1,
        kd_weight=0.3,
    )
    made.train()
    inputs = {name: torch.tensor([row[name] for row in data]) for name in data[0]}
    wanted = Distiller(classifier(0), classifier(1, 2), KDConfig(kd_weight=0.3))(inputs)
    assert made.state.log_history[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_schedules_are_logged_as_they_were_used(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, classifier(1, 2), kd_weight="steps 0:1 0.5:0.25", temperature="0:4 1:1", teacher_scale="0:0.5 1:1"
    )
    made.train()
    logs = [log for log in made.state.log_history if "kd_weight" in log]
    assert [log["kd_weight"] for log in logs] == [1, 1, 0.25, 0.25]
    assert [log["temperature"] for log in logs] == [4, 3.25, 2.5, 1.75]
    assert [log["teacher_scale"] for log in logs] == [0.5, 0.625, 0.75, 0.875]
    for log in logs:
        assert log["loss"] == pytest.approx((1 - log["kd_weight"]) * log["ce"] + log["kd_weight"] * log["kd"], rel=1e-4)


def test_rows_without_labels_learn_from_the_teacher(tmp_path: Path) -> None:
    teacher, student = classifier(1, 2), classifier(0)
    inputs = batch()
    inputs["labels"][1:3] = -100
    loss = Distiller(student, teacher, KDConfig(kd_weight=0.4))(inputs)
    z, t = student(**{**inputs, "labels": None}).logits, teacher(**{**inputs, "labels": None}).logits
    kd = kl_div(log_softmax(z, 1), log_softmax(t, 1), reduction="none", log_target=True).sum(1)
    ce = cross_entropy(z, inputs["labels"], reduction="none")
    torch.testing.assert_close(loss, (0.6 * ce + 0.4 * kd).mean())
    bare = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows()]
    made = trainer(tmp_path, teacher, train_dataset=Dataset.from_list(bare), kd_weight=1.0, max_steps=30)
    made.train()
    logs = [log for log in made.state.log_history if "kd" in log]
    assert logs[-1]["kd"] < 0.5 * logs[0]["kd"]
    assert "ce" not in logs[0]
    with pytest.raises(ValueError, match="no labels"):
        trainer(tmp_path, None, train_dataset=Dataset.from_list(bare)).train()


def test_regression_compares_numbers_with_numbers() -> None:
    """The authors' code of Annealing-KD compares (B, 1) with (B,): a perfect student loses 7 there."""
    student, teacher, inputs = classifier(0, classes=1), classifier(1, 2, classes=1), batch()
    inputs["labels"] = student(**{**inputs, "labels": None}).logits.detach().squeeze(1)
    assert Distiller(student)(inputs).item() == pytest.approx(0, abs=1e-10)
    loss = Distiller(student, teacher, KDConfig(kd_weight=0.5, teacher_scale=0.7))(inputs)
    taught = teacher(**{**inputs, "labels": None}).logits.squeeze(1) * 0.7
    torch.testing.assert_close(loss, 0.5 * mse_loss(inputs["labels"], taught))


def test_the_teacher_and_the_settings_of_both_stay(tmp_path: Path) -> None:
    teacher, student = classifier(1, 2), classifier(0, dropout=0.5)
    student.train()
    teacher.train()
    before = weights(teacher)
    modes = {name: module.training for name, module in student.named_modules()}
    distiller = Distiller(student, teacher)
    torch.manual_seed(3)
    first = distiller(batch()).item()
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert distiller(batch()).item() != first  # its dropout is on
    made = trainer(tmp_path, teacher)
    made.train()
    assert_same(weights(teacher), before)


def test_evaluation_shows_the_teacher_beside_the_student(tmp_path: Path) -> None:
    teacher, student = classifier(1, 2), classifier(0)
    made = trainer(tmp_path, teacher, student, eval_dataset=Dataset.from_list(rows(count=6)))
    found = made.evaluate()
    inputs = {name: torch.tensor([row[name] for row in rows(count=6)]) for name in rows(count=1)[0]}
    with torch.no_grad():
        z, t = student(**inputs).logits, teacher(**inputs).logits
    y = inputs["labels"]
    assert found["eval_loss"] == pytest.approx(cross_entropy(z, y).item(), rel=1e-5)
    assert found["eval_ce"] == pytest.approx(cross_entropy(z, y).item(), rel=1e-5)
    assert found["eval_teacher_ce"] == pytest.approx(cross_entropy(t, y).item(), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx((z.argmax(1) == y).float().mean().item())
    assert found["eval_teacher_accuracy"] == pytest.approx((t.argmax(1) == y).float().mean().item())
    assert found["eval_agreement"] == pytest.approx((z.argmax(1) == t.argmax(1)).float().mean().item())
    assert made.state.log_history[-1]["eval_teacher_ce"] == found["eval_teacher_ce"]


@pytest.mark.parametrize(
    ("teacher", "settings"),
    [
        (None, {}),
        ("manual", {"kd_weight": "0:1 1:0"}),
        ("model", {"kd_weight": "steps 0:1 0.6:0", "divergence": "mse", "teacher_scale": "0:0.1 1:1"}),
        ("list", {"teacher_switches": [0.3, 0.7]}),
        ("ema", {"ema_decay": 0.8, "temperature": "0:3 1:1"}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(teacher: str | None, settings: dict[str, Any], tmp_path: Path) -> None:
    def made(folder: str, **more: Any) -> KDTrainer:
        who: Any = {"model": classifier(1, 2), "list": [classifier(i, 2) for i in (1, 2, 3)]}.get(
            teacher or "", teacher
        )
        # dropout, so that the draws have to go on too
        return trainer(tmp_path / folder, who, classifier(0, dropout=0.5), max_steps=6, **settings, **more)

    whole = made("whole", save_strategy="steps", save_steps=3)
    whole.train()
    again = made("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(weights(again.model), weights(whole.model))
    one, other = ([log["loss"] for log in each.state.log_history if "loss" in log] for each in (whole, again))
    assert one[3:] == other[-3:]


def test_an_ema_that_was_not_saved_is_no_ema(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="have a state of their own"):
        trainer(tmp_path, "ema").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_paths_adapters_and_a_second_process(tmp_path: Path) -> None:
    classifier(1, 2).save_pretrained(tmp_path / "teacher")
    made = trainer(tmp_path / "out", tmp_path / "teacher", peft_config=LoraConfig(r=2, task_type="SEQ_CLS"))
    first = {key: made.evaluate(Dataset.from_list(rows()))[key] for key in ("eval_kd", "eval_teacher_ce")}
    made.train()
    made.model.get_base_model().save_pretrained(tmp_path / "base")
    base = classifier(4, 2)
    base.save_pretrained(tmp_path / "base")
    from peft import get_peft_model

    adapted = get_peft_model(
        type(base).from_pretrained(tmp_path / "base"), LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    code = f"""
import json, sys
sys.modules["trl"] = None  # nothing of it is needed
from datasets import Dataset
from tests.trainers.kd.common import rows, trainer
found = {{}}
for name in ("teacher", "adapter"):
    metrics = trainer({str(tmp_path / "other")!r}, {str(tmp_path)!r} + "/" + name).evaluate(Dataset.from_list(rows()))
    found[name] = metrics["eval_teacher_ce"]
print("found", json.dumps(found))
"""
    root = Path(__file__).parents[3]  # where `tests` is found
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("found")[2])
    assert found["teacher"] == pytest.approx(first["eval_teacher_ce"], rel=1e-5)
    whole = {name: torch.tensor([row[name] for row in rows()]) for name in rows(count=1)[0]}
    with torch.no_grad():
        wanted = cross_entropy(adapted.eval()(**{**whole, "labels": None}).logits, whole["labels"]).item()
    assert found["adapter"] == pytest.approx(wanted, rel=1e-5)


def test_a_list_teaches_in_its_order(tmp_path: Path) -> None:
    teachers = [classifier(i, 2) for i in (1, 2, 3)]
    distiller = Distiller(classifier(0), teachers, KDConfig(kd_weight=1.0, teacher_switches=[0.25, 0.5]))
    for progress, teacher in ((0, 0), (0.24, 0), (0.25, 1), (0.49, 1), (0.5, 2), (1, 2)):
        wanted = Distiller(classifier(0), teachers[teacher], KDConfig(kd_weight=1.0))(batch())
        torch.testing.assert_close(distiller(batch(), progress), wanted)


def epochs(text: Any, count: int, n: int) -> list[float]:
    """The value in the middle of each of the first `count` of n epochs."""
    return [round(Schedule.parse(text)((i + 0.5) / n), 6) for i in range(count)]


def test_annealing_is_the_papers() -> None:
    config = KDConfig.annealing(k=14, m=4, tau_max=7)
    # tau 7, 7, 6, 6, ..., 1, 1 and phi = 1 - (tau - 1) / 7; then the labels
    taus = [7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
    assert epochs(config.teacher_scale, 14, 18) == [round(1 - (tau - 1) / 7, 6) for tau in taus]
    assert epochs(config.kd_weight, 18, 18) == [1] * 14 + [0] * 4
    assert config.divergence == "mse"
    # what the authors' code cannot: fewer epochs than stairs, or no multiple; phi stays at most 1
    for k in (3, 13, 20):
        scale = Schedule.parse(KDConfig.annealing(k=k, m=3, tau_max=7).teacher_scale)
        assert len(set(scale.values)) == 7
        assert max(scale.values) == 1


def test_continuation_is_the_papers() -> None:
    config = KDConfig.continuation(margin=0.4)
    phi, kd = epochs(config.teacher_scale, 30, 30), epochs(config.kd_weight, 30, 30)
    tau, wanted = 10, []
    for i in range(1, 31):
        tau -= i % 3 == 0 and tau > 1  # the paper lets it fall to 0 in the last epoch
        wanted.append(round(1 - (tau - 1) / 10, 6))
    assert phi == wanted
    assert phi[19] == 0.7  # the teacher is never used whole
    assert kd == [round(1 - i / 40, 6) for i in range(1, 21)] + [0] * 10
    assert (config.divergence, config.margin) == ("hinge", 0.4)
    cifar = KDConfig.continuation(margin=1.0, n=200, tau_max=20, ramp=150, until=149)
    assert epochs(cifar.teacher_scale, 149, 200)[-1] == 0.75
    with pytest.raises(TypeError, match="margin"):
        KDConfig.continuation()


def test_continuation_without_margin_and_ramp_is_annealing() -> None:
    """But for the sum over classes, where annealing has their mean."""
    student, teacher, classes = classifier(0), classifier(1, 2), 3
    one = Distiller(student, teacher, KDConfig(divergence="mse", kd_weight="steps 0:1 0.5:0", teacher_scale=0.5))
    other = Distiller(student, teacher, KDConfig(divergence="hinge", kd_weight="steps 0:1 0.5:0", teacher_scale=0.5))
    torch.testing.assert_close(one(batch(), 0.2) * classes, other(batch(), 0.2))
    torch.testing.assert_close(one(batch(), 0.6), other(batch(), 0.6))


def test_pro_kd_hands_over_evenly() -> None:
    config = KDConfig.pro_kd(checkpoints=3, k=6, m=2)
    assert config.teacher_switches == [0.25, 0.5]
    assert epochs(config.kd_weight, 8, 8) == [1] * 6 + [0] * 2
    assert epochs(config.teacher_scale, 6, 8) == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1], abs=1e-6)


def test_the_hardest_augmentations() -> None:
    student, teacher, inputs = classifier(0), classifier(1, 2), batch(count=8)
    with torch.no_grad():
        z, t = (each(**{**inputs, "labels": None}).logits / 2 for each in (student, teacher))
    far = kl_div(log_softmax(z, 1), log_softmax(t, 1), reduction="none", log_target=True).sum(1)
    wanted = [i for start in (0, 4) for i in sorted(sorted(range(start, start + 4), key=lambda i: -far[i])[:2])]
    student.train()
    distiller = Distiller(student, teacher, KDConfig(temperature=2.0))
    found = distiller.hardest(inputs, of=4, keep=2)
    assert student.training
    for name, value in inputs.items():
        assert torch.equal(found[name], value[wanted])
    bare = {name: value for name, value in inputs.items() if name != "labels"}
    assert torch.equal(distiller.hardest(bare, 4, 2)["input_ids"], found["input_ids"])
    for of, keep in ((3, 1), (4, 5), (4, 0)):
        with pytest.raises(ValueError, match=f"of={of}, keep={keep}"):
            distiller.hardest(inputs, of, keep)
    with pytest.raises(ValueError, match="a model as teacher"):
        Distiller(student).hardest(inputs, 4, 2)


def test_settings_from_a_command_line() -> None:
    from transformers import HfArgumentParser

    words = [
        "--features",
        "hidden:1",
        "--layer_map",
        "1:2",
        "--average_from",
        "0.5",
        "--label_noise",
        "drop",
        "--noise_rate",
        "0.2",
    ]
    (config,) = HfArgumentParser(KDConfig).parse_args_into_dataclasses(["--output_dir", "out", *words])
    assert (config.features, config.layer_map) == ({"hidden": 1.0}, "1:2")
    assert (config.average_from, config.label_noise, config.noise_rate) == (0.5, "drop", 0.2)
