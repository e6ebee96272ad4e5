"""The density loss under transformers.Trainer and trl.SFTTrainer: one step's change against the hand-written loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from peft_dynamic.density import ActivationDensityLoss
from tests.density.models import (
    EPS,
    WEIGHT,
    assert_same,
    batch_for,
    density_by_hand,
    gradients,
    with_lora,
)

pytestmark = [pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")]


def arguments(folder: Path, cls: Any = TrainingArguments, **settings: Any) -> Any:
    """Plain gradient descent with a rate of 1, so that a step changes each parameter by its gradient."""
    defaults = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }
    return cls(str(folder), **(defaults | settings))


def rows_of(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{key: value[row] for key, value in batch.items()} for row in range(len(batch["labels"]))]


def step_of(trainer: Any, model: Any) -> dict[str, torch.Tensor]:
    """Train, and the gradient that the parameters' change shows."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(model.named_parameters())
    return {name: value - after[name].detach() for name, value in before.items()}


def whole_batch(model: Any, family: str, batch: dict) -> tuple[dict[str, torch.Tensor], float, float]:
    """Gradients of the one large batch, its task loss and its density."""
    output, density = density_by_hand(model, family, batch, lambda: model(**batch))
    (output.loss + WEIGHT * density).backward()
    return gradients(model), float(output.loss.detach()), float(density.detach())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["whole", "accumulated", "checkpointed"],
)
@pytest.mark.parametrize("family", ["Bert", "Llama"])  # Llama's loss is scaled by num_items_in_batch, Bert's is not
def test_a_step_of_trainer(tmp_path: Path, family: str, settings: dict) -> None:
    model, batch = with_lora(family), batch_for(family)
    wanted, loss, value = whole_batch(model, family, batch)
    if family == "Bert" and "gradient_accumulation_steps" in settings:
        # Trainer itself adds the parts' losses up here, without dividing them: what it does without us, and our term
        plain = with_lora(family)
        trainer = Trainer(plain, arguments(tmp_path, **settings), train_dataset=rows_of(batch))
        wanted = step_of(trainer, plain)
        loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        _, density = density_by_hand(model, family, batch, lambda: model(**batch))
        (WEIGHT * density).backward()
        for name, gradient in gradients(model).items():
            wanted[name] = wanted[name] + gradient
    ActivationDensityLoss(WEIGHT, EPS).attach(model)
    trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=rows_of(batch))
    assert_same(step_of(trainer, model), wanted)
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log["density_loss"] == pytest.approx(value, rel=1e-4)
    assert log["loss"] == pytest.approx(loss, rel=1e-3)  # the task's alone
    assert "backward" not in trainer.accelerator.__dict__


def test_a_last_step_of_fewer_parts(tmp_path: Path) -> None:
    """Six batches in steps of four: the second step has two parts, and each counts half."""
    model, batch = with_lora("Llama"), batch_for("Llama", size=6)
    ActivationDensityLoss(WEIGHT, EPS).attach(model)
    common = {"per_device_train_batch_size": 1, "max_steps": -1, "num_train_epochs": 1}
    trainer = Trainer(model, arguments(tmp_path, gradient_accumulation_steps=4, **common), train_dataset=rows_of(batch))
    step_of(trainer, model)
    found = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    other = with_lora("Llama")
    for rows in (slice(0, 4), slice(4, 6)):
        grads, _, _ = whole_batch(other, "Llama", {key: value[rows] for key, value in batch.items()})
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if name in grads:
                    parameter -= grads[name]
    assert_same(found, {name: p.detach() for name, p in other.named_parameters() if p.requires_grad})


def test_losses_that_do_not_come_from_the_model(tmp_path: Path) -> None:
    model, batch = with_lora("Bert"), batch_for("Bert")
    _, density = density_by_hand(model, "Bert", batch, lambda: model(**batch))
    output = model(**batch)
    (output.logits.pow(2).mean() + WEIGHT * density).backward()
    wanted = gradients(model)
    ActivationDensityLoss(WEIGHT, EPS).attach(model)

    def own(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.pow(2).mean()

    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows_of(batch), compute_loss_func=own)
    assert_same(step_of(trainer, model), wanted)


def test_autocast_and_eval_in_trainer(tmp_path: Path) -> None:
    model, batch = with_lora("Bert"), batch_for("Bert")
    wanted, _, _ = whole_batch(model, "Bert", batch)
    model.eval()
    with torch.no_grad():
        plain = float(model(**batch).loss)
    density = ActivationDensityLoss(WEIGHT, EPS).attach(model)
    trainer = Trainer(model, arguments(tmp_path, bf16=True), train_dataset=rows_of(batch), eval_dataset=rows_of(batch))
    metrics = trainer.evaluate()
    assert density.value is None
    assert "eval_density_loss" not in metrics
    assert metrics["eval_loss"] == pytest.approx(plain, rel=2e-2)
    found = step_of(trainer, model)
    flat = [torch.cat([each[name].flatten() for name in wanted]) for each in (found, wanted)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99


def test_weight_zero_under_trainer_is_bitwise_nothing_and_logged(tmp_path: Path) -> None:
    batch = batch_for("Bert")
    plain = with_lora("Bert")
    wanted = step_of(Trainer(plain, arguments(tmp_path), train_dataset=rows_of(batch)), plain)
    model = with_lora("Bert")
    ActivationDensityLoss(0.0, EPS).attach(model)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows_of(batch))
    found = step_of(trainer, model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert 0 < trainer.state.log_history[0]["density_loss"] < 1


def test_reentrant_checkpointing_is_refused_before_a_parameter_changes(tmp_path: Path) -> None:
    model, batch = with_lora("Llama"), batch_for("Llama")
    ActivationDensityLoss(WEIGHT, EPS).attach(model)
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=rows_of(batch))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="'use_reentrant': False"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "backward" not in trainer.accelerator.__dict__


def test_penalty_inside_a_trainer_is_refused(tmp_path: Path) -> None:
    model, batch = with_lora("Bert"), batch_for("Bert")
    density = ActivationDensityLoss(WEIGHT, EPS).attach(model)

    def own(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.pow(2).mean() + density.penalty()

    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows_of(batch), compute_loss_func=own)
    with pytest.raises(RuntimeError, match=r"leave penalty\(\) out"):
        trainer.train()


# --- TRL


def tokenizer_of_numbers(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {str(number): number for number in range(3, 64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="3")


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": False},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True},
        {"packing": True, "max_length": 40, "gradient_checkpointing": False},
    ],
    ids=["whole", "accumulated, checkpointed", "packed"],
)
def test_a_step_of_sft_trainer(tmp_path: Path, settings: dict) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, batch = with_lora("Llama"), batch_for("Llama")
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    if settings.get("packing"):  # one row of all tokens, in which each document has its own positions
        joined = torch.tensor([[token for row in sorted(rows, key=len, reverse=True) for token in row]])
        positions = torch.cat([torch.arange(len(row)) for row in sorted(rows, key=len, reverse=True)])[None]
        labels = joined.masked_fill(positions == 0, -100)
        batch = {"input_ids": joined, "labels": labels, "position_ids": positions, "use_cache": False}
        settings = settings | {"per_device_train_batch_size": 1}
    wanted, _, value = whole_batch(model, "Llama", batch)
    density = ActivationDensityLoss(WEIGHT, EPS).attach(model)
    trainer = trl.SFTTrainer(
        model,
        args=arguments(tmp_path, trl.SFTConfig, **settings),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
        processing_class=tokenizer_of_numbers(tmp_path),
    )
    found = step_of(trainer, model)
    assert_same(found, wanted)
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log["density_loss"] == pytest.approx(value, rel=1e-4)
    assert "entropy" in log
    density.detach()


@pytest.mark.parametrize("parts", [1, 4])
def test_a_task_that_the_host_multiplies_is_told_of(
    tmp_path: Path, parts: int, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers 5.23: four parts of a batch give a classifier four times the gradient of the whole batch."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    data = [{"input_ids": torch.arange(i, i + 5), "labels": torch.tensor(i % 2)} for i in range(4)]
    norms: dict[int, torch.Tensor] = {}

    def gradient(parts: int, attach: bool) -> list[Any]:
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(vocab_size=9, **sizes, **still))
        density = ActivationDensityLoss(weight=0.0).attach(model) if attach else None

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                norms[parts] = model.classifier.weight.grad.norm()

        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4 // parts,
            gradient_accumulation_steps=parts,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            max_grad_norm=0,
            dataloader_pin_memory=False,
        )
        caplog.clear()
        Trainer(model, arguments, train_dataset=data, callbacks=[Look()]).train()
        if density is not None:
            density.detach()
        return [message for message in caplog.messages if "accumulation steps, so the density" in message]

    assert len(gradient(parts, attach=True)) == (parts > 1)
    gradient(1, attach=False)
    torch.testing.assert_close(norms[parts], parts * norms[1], rtol=1e-4, atol=1e-6)
