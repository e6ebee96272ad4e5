"""KDSFTTrainer trains on the formula whatever the data, and exits learn from the full depth, without full logits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from peft_dynamic.trainers import KDSFTConfig, KDSFTTrainer, SoFTConfig
from tests.trainers.soft.common import TOY, assert_trained_as_sft, first_batch, rows, tokenizer, words
from tests.trainers.soft.common import trainer as soft
from tests.trainers.soft.families import build, cut

TEXT = [{"text": words(5 + i % 4, i)} for i in range(8)]
CHATS = [
    {"messages": [{"role": "user", "content": words(3, i)}, {"role": "assistant", "content": words(2 + i % 3, 50 + i)}]}
    for i in range(8)
]
DATA: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompts": (rows(), {}),
    "text": (TEXT, {}),
    "assistant-only": (CHATS, {"assistant_only_loss": True}),
    "packing": (rows(), {"packing": True, "max_length": 24}),
    "padding-free": (rows(), {"padding_free": True, "max_length": None}),
}


def trainer(folder: Path, teacher: Any = None, model: Any = None, data: Any = None, **more: Any) -> KDSFTTrainer:
    others = {key: more.pop(key) for key in ("peft_config", "eval_dataset", "callbacks") if key in more}
    config = {**TOY, "max_steps": 3, "per_device_eval_batch_size": 4, **more}
    return KDSFTTrainer(
        build("llama") if model is None else model,
        teacher,
        KDSFTConfig(str(folder), **config),
        train_dataset=Dataset.from_list(rows() if data is None else data),
        processing_class=tokenizer(),
        **others,
    )


def plain(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(N, V) logits of the labelled positions, all of them in memory."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    return logits[:, :-1][batch["labels"][:, 1:] != -100]


def targets(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]


def kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    p, q = log_softmax(student / temperature, 1), log_softmax(teacher.detach() / temperature, 1)
    return kl_div(p, q, reduction="batchmean", log_target=True) * temperature**2


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_loss_and_gradients(made: Any, wanted: torch.Tensor, loss: torch.Tensor) -> None:
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    made.model.zero_grad()
    loss.backward()
    found = gradients(made.model)
    made.model.zero_grad()
    wanted.backward()
    wanted_gradients = gradients(made.model)
    assert found.keys() == wanted_gradients.keys()
    for name, value in wanted_gradients.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.filterwarnings("ignore:.*[Pp]adding-free.*")
def test_every_kind_of_data(kind: str, tmp_path: Path) -> None:
    data, more = DATA[kind]
    teacher = build("llama", seed=1)
    made = trainer(tmp_path, teacher, data=data, kd_weight=0.3, temperature=2.0, **more)
    batch = first_batch(made)
    made.model.train()
    made.state.max_steps = 3
    loss = made.compute_loss(made.model, dict(batch))
    z, t, y = plain(made.model, batch), plain(teacher, batch), targets(batch)
    assert_loss_and_gradients(made, 0.7 * cross_entropy(z, y) + 0.3 * kl(z, t, 2.0), loss)


def test_it_is_the_loss_of_gkd_without_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary for the host: TRL's own function, at temperature 1, which is all that it uses."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    teacher = build("llama", seed=1)
    made = trainer(tmp_path, teacher, kd_weight=1.0)
    batch = first_batch(made)
    made.model.train()
    loss = made.compute_loss(made.model, dict(batch))
    with torch.no_grad():
        z, t = (model(**batch).logits[:, :-1] for model in (made.model, teacher))
        theirs = GKDTrainer.generalized_jsd_loss(z, t, batch["labels"][:, 1:], beta=0.0, temperature=1.0)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_without_a_teacher_it_is_sft(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_length=64)
    made.train()
    assert_trained_as_sft(made, ("loss", "mean_token_accuracy", "num_tokens"))


@pytest.mark.parametrize("teacher", ["base", "ema", "smoothing", "manual", "path"])
def test_teachers_train_and_resume_to_the_bit(teacher: str, tmp_path: Path) -> None:
    who: Any = teacher
    if teacher == "path":
        build("llama", seed=1).save_pretrained(tmp_path / "teacher")
        tokenizer().save_pretrained(tmp_path / "teacher")
        who = tmp_path / "teacher"
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.3)

    def made(folder: str, **more: Any) -> KDSFTTrainer:
        settings = {"max_steps": 4, "kd_weight": "0:0.9 1:0.1", "ema_decay": 0.5, **more}
        torch.manual_seed(2)
        return trainer(tmp_path / folder, who, peft_config=copy.deepcopy(config), **settings)

    whole = made("whole", save_strategy="steps", save_steps=2)
    whole.train()
    again = made("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, p), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(p, other), name
    logs = [log for log in whole.state.log_history if "ce" in log]
    assert len(logs) == 4
    assert ("kd" in logs[0]) == (teacher != "smoothing")
    assert ("kd_weight" in logs[0]) == (teacher != "smoothing")
    if teacher != "smoothing":
        assert [log["kd_weight"] for log in logs] == pytest.approx([0.9, 0.7, 0.5, 0.3])


def test_a_teacher_learns_itself_by_heart(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, build("llama", seed=1), max_steps=60, kd_weight=1.0, eval_dataset=Dataset.from_list(rows())
    )
    before, after = made.evaluate(), (made.train(), made.evaluate())[1]
    assert after["eval_kd"] < 0.3 * before["eval_kd"]
    assert after["eval_agreement"] > before["eval_agreement"]
    # the labels' loss and the teacher's are evaluated too
    teacher = build("llama", seed=1)
    z, nll = [], []
    for batch in made.get_eval_dataloader():
        with torch.no_grad():
            t = plain(teacher, dict(batch))
            z.append(cross_entropy(plain(made.model.eval(), dict(batch)), targets(batch), reduction="sum"))
            nll.append(cross_entropy(t, targets(batch), reduction="sum"))
    count = sum(len(targets(batch)) for batch in made.get_eval_dataloader())
    assert after["eval_loss"] == pytest.approx(float(sum(z)) / count, rel=1e-4)
    assert after["eval_teacher_ce"] == pytest.approx(float(sum(nll)) / count, rel=1e-4)


@pytest.mark.parametrize(
    ("teacher", "settings", "text"),
    [
        ("base", {}, "needs a PeftModel"),
        (None, {"loss_type": "dft"}, "use 'nll'"),
        ("smoothing", {"label_smoothing_factor": 0.1}, "teacher='smoothing'"),
        (None, {"kd_weight": 2}, "kd_weight=2"),
        ("base", {"sample_weights": "meta"}, "sample_weights='meta' weighs a classifier's rows"),
        ("base", {"features": {"hidden": 1.0}}, "KDSFTTrainer sees the last states alone"),
        ("base", {"label_noise": "drop", "noise_rate": 0.1}, "label_noise='drop' judges the labels of a classifier's"),
    ],
)
def test_refusals(teacher: Any, settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        trainer(tmp_path, teacher, **settings)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_exits_learn_from_the_full_depth(temperature: float, tmp_path: Path) -> None:
    made = soft(tmp_path, exits=[2, 4, 6], exit_kd=0.4, exit_kd_temperature=temperature)
    batch = first_batch(made)
    made.model.train()
    loss = made.compute_loss(made.model, dict(batch))
    loss.backward()
    found = gradients(made.model)
    made.model.zero_grad()
    decoder, y = made.decoder, targets(batch)
    states = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    keep = batch["labels"][:, 1:] != -100
    z = [decoder.logits(states.hidden_states[k][:, :-1][keep]) for k in (2, 4)]
    z.append(states.logits[:, :-1][keep])
    each = [0.6 * cross_entropy(one, y) + 0.4 * kl(one, z[-1], temperature) for one in z[:2]]
    wanted = (each[0] + each[1] + cross_entropy(z[-1], y)) / 3
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    wanted.backward()
    for name, value in gradients(made.model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_exit_kd_is_logged_and_evaluated_as_before(tmp_path: Path) -> None:
    logs, evaluations = [], []
    for weight in (0.0, "steps 0:0 0.5:0.7"):
        made = soft(tmp_path, exits=[2, 6], exit_kd=weight, eval_data=rows(4), per_device_eval_batch_size=4)
        evaluations.append({key: value for key, value in made.evaluate().items() if key.endswith("loss")})
        made.train()
        logs.append([log for log in made.state.log_history if "exit_2_loss" in log])
    assert evaluations[0] == evaluations[1]
    assert "exit_2_kd" not in logs[0][0]
    assert [("exit_2_kd" in log, "exit_2_agreement" in log, "exit_6_kd" in log) for log in logs[1]] == [
        (False, False, False),
        (True, True, False),
    ]
    assert logs[0][0]["exit_2_loss"] == logs[1][0]["exit_2_loss"]


@pytest.mark.parametrize("settings", [{"exit_kd": 1.2}, {"exit_kd": "0:0 1:-1"}, {"exit_kd_temperature": 0}])
def test_exit_kd_out_of_range(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SoFTConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_a_cut_student_learns_from_the_model_it_was_cut_from(tmp_path: Path) -> None:
    student = cut(build("llama"), 1)
    made = trainer(tmp_path, build("llama"), student, max_steps=40, kd_weight=1.0)
    made.train()
    values = [log["kd"] for log in made.state.log_history if "kd" in log]
    assert sum(values[-5:]) < 0.5 * sum(values[:5])


def test_the_mean_of_the_last_steps_is_left(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    made = trainer(tmp_path, "base", peft_config=config, average_from=0.6, max_steps=3)
    seen = []
    step = made.average.add

    def noted() -> None:
        seen.append([p.detach().double().clone() for p in made.model.parameters() if p.requires_grad][:2])
        step()

    made.average.add = noted
    made.train()
    assert len(seen) == 2  # after the steps 2 and 3
    u, s, v = torch.linalg.svd((seen[0][1] @ seen[0][0] + seen[1][1] @ seen[1][0]) / 2)
    a, b = [p.detach().double() for p in made.model.parameters() if p.requires_grad][:2]
    torch.testing.assert_close(b @ a, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-6)
