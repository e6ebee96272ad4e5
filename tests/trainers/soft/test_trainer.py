"""SoFTTrainer computes the mean of the cut models' losses, whatever the data, the adapter and the architecture."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
import peft
from datasets import Dataset
from torch import nn
from transformers import LlamaForCausalLM, TrainingArguments

from peft_dynamic import ActivationDensityLoss
from peft_dynamic.trainers import SoFTConfig, SoFTTrainer, truncate_to_exit
from tests import methods
from tests.trainers.soft.common import (
    assert_losses_and_gradients,
    assert_trained_as_sft,
    first_batch,
    plain_losses,
    rows,
    tokenizer,
    trained,
    trainer,
    words,
)
from tests.trainers.soft.families import FAMILIES, build

EXITS = [2, 4, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_mean_of_the_cut_models_losses(family: str, tmp_path: Path) -> None:
    assert_losses_and_gradients(trainer(tmp_path, build(family)), EXITS)


TEXT = [{"text": words(5 + i % 4, i)} for i in range(8)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": words(3, i)},
            {"role": "assistant", "content": words(2 + i % 3, 50 + i)},
        ]
    }
    for i in range(8)
]
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (TEXT, {}),
    "chat": (CHATS, {}),
    "assistant-only": (CHATS, {"assistant_only_loss": True}),
    "whole prompt": (rows(), {"completion_only_loss": False}),
    "packing": (rows(), {"packing": True, "max_length": 24}),
    "packing, wrapped": (TEXT, {"packing": True, "packing_strategy": "wrapped", "max_length": 12}),
    "padding-free": (rows(), {"padding_free": True, "max_length": None}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*[Pp]adding-free.*")
def test_every_kind_of_data(kind: str, tmp_path: Path) -> None:
    data, more = KINDS[kind]
    made = trainer(tmp_path, data=data, **more)
    assert_losses_and_gradients(made, EXITS)


TASK = {"task_type": "CAUSAL_LM"}
ALL = {"target_modules": "all-linear", **TASK}
STARTED = {"init_lora_weights": False}
ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(**ALL, **STARTED),
    "trained head and norm": lambda: peft.LoraConfig(**ALL, modules_to_save=["lm_head", "norm"]),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **TASK),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    **methods.configs(
        "all-linear",
        own={"dylora": STARTED, "moslora": STARTED, "density-lora": STARTED | {"density_weight": 0.0}},
        **TASK,
    ),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
def test_every_kind_of_adapter(adapter: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, peft_config=ADAPTERS[adapter]())
    assert_losses_and_gradients(made, EXITS)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    for name, p in made.model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in trained(made.model).items())


def test_every_parameter_is_trained(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    assert all(not torch.equal(p, before[name]) for name, p in made.model.named_parameters())


def test_one_exit_at_the_full_depth_trains_as_sft(tmp_path: Path) -> None:
    mine = trainer(tmp_path, exits=[6], max_steps=3, max_length=64)
    mine.train()
    assert_trained_as_sft(mine, ("loss", "grad_norm", "mean_token_accuracy", "num_tokens"))


def test_weights_and_logged_losses(tmp_path: Path) -> None:
    made = trainer(tmp_path, exit_weights=[1.0, 2.0, 5.0], max_steps=1)
    losses = plain_losses(made.model, first_batch(made), EXITS).tolist()
    made.train()
    log = made.state.log_history[0]
    for k, value in zip(EXITS, losses, strict=True):
        assert log[f"exit_{k}_loss"] == pytest.approx(value, rel=1e-5)
    assert log["loss"] == pytest.approx((losses[0] + 2 * losses[1] + 5 * losses[2]) / 8, rel=1e-5)


def test_evaluation_by_exit(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_data=rows(4), per_device_eval_batch_size=4, eval_exits=[1, 3, 6])
    batch = dict(next(iter(made.get_eval_dataloader())))
    wanted = plain_losses(made.model, batch, [1, 3, 6]).tolist()
    found = made.evaluate()
    assert [found[f"eval_exit_{k}_loss"] for k in (1, 3, 6)] == pytest.approx(wanted, rel=1e-5)
    assert found["eval_loss"] == pytest.approx(sum(wanted) / 3, rel=1e-5)
    assert not [key for key in found if key.startswith("eval_exit_") and key[10] in "245"]
    everything = trainer(tmp_path, eval_data=rows(4), exit_weights=[1.0, 1.0, 2.0], exits_per_step=1).evaluate()
    assert [key for key in everything if key.startswith("eval_exit_")] == [f"eval_exit_{k}_loss" for k in EXITS]
    losses = [everything[f"eval_exit_{k}_loss"] for k in EXITS]
    assert everything["eval_loss"] == pytest.approx((losses[0] + losses[1] + 2 * losses[2]) / 4, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*return_outputs.*:FutureWarning")
def test_predictions_are_the_full_models(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_data=rows(4))
    batch = dict(next(iter(made.get_eval_dataloader())))
    _, logits, _ = made.prediction_step(made.model, dict(batch), prediction_loss_only=False)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(logits, made.model(**inputs).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_gradient_checkpointing(tmp_path: Path, reentrant: bool, adapter: str | None) -> None:
    found = []
    for on in (False, True):
        more = {"peft_config": ADAPTERS[adapter]()} if adapter else {}
        kwargs = {"use_reentrant": reentrant} if on else None
        made = trainer(tmp_path, gradient_checkpointing=on, gradient_checkpointing_kwargs=kwargs, **more)
        made.train()
        found.append(trained(made.model))
    for name, p in found[0].items():
        torch.testing.assert_close(p, found[1][name], rtol=1e-5, atol=1e-6)


class FewArguments(LlamaForCausalLM):
    """Trainer thinks of such a forward that it can't divide by the tokens of all parts of a step."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, use_cache: Any = None
    ) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=use_cache)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, FewArguments])
def test_accumulation_is_the_full_batch(kind: type, tmp_path: Path) -> None:
    models = build("llama"), build("llama")
    for model in models:
        model.__class__ = kind
    whole = trainer(tmp_path, models[0], exits_per_step=1)
    accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    parts = trainer(tmp_path, models[1], exits_per_step=1, **accumulated)
    whole.train()
    parts.train()
    for name, p in trained(whole.model).items():
        torch.testing.assert_close(p, trained(parts.model)[name], rtol=1e-4, atol=1e-5)
    for one, two in zip(whole.state.log_history[:2], parts.state.log_history[:2], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def drawn(made: SoFTTrainer) -> list[list[int]]:
    """The exits of each step, from the log."""
    return [
        [int(key.split("_")[1]) for key in log if key.startswith("exit_")]
        for log in made.state.log_history
        if "loss" in log
    ]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "exits": 5, "exits_per_step": 2, "save_strategy": "steps"}
    settings |= {"save_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "eval_data": rows(2)}
    whole, resumed = trainer(tmp_path, **settings), trainer(tmp_path, **settings)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    exits = drawn(whole)
    assert exits == drawn(resumed)
    assert all(len(step) == 3 and step[-1] == 6 for step in exits)
    assert len({tuple(step) for step in exits}) > 1
    for name, p in trained(whole.model).items():
        assert torch.equal(p, trained(resumed.model)[name]), name


def test_the_density_term_is_added_in_full(tmp_path: Path) -> None:
    found = []
    for weight in (0.0, 3.0):
        made = trainer(tmp_path, peft_config=ADAPTERS["lora"]())
        density = ActivationDensityLoss(weight=weight, eps=1.0).attach(made.model)
        batch = first_batch(made)
        made.training_step(made.model, dict(batch), (batch["labels"][:, 1:] != -100).sum())
        found.append({name: p.grad for name, p in trained(made.model).items()})
    made.model.zero_grad()
    output = made.model(**{name: value for name, value in batch.items() if name != "labels"})
    density.penalty().backward()
    alone = trained(made.model)
    for name, gradient in found[0].items():
        extra = alone[name].grad if alone[name].grad is not None else torch.zeros_like(gradient)
        torch.testing.assert_close(found[1][name] - gradient, extra, rtol=1e-3, atol=1e-5)
    assert output.loss is None
    assert max(p.grad.abs().max() for p in alone.values() if p.grad is not None) > 1e-3


def test_bfloat16_by_default_is_near_float32(tmp_path: Path) -> None:
    made, exact = trainer(tmp_path, bf16=None), trainer(tmp_path)
    assert made.args.bf16
    made.train()
    exact.train()
    for one, two in zip(made.state.log_history[:2], exact.state.log_history[:2], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.02)


def test_a_batch_without_labels_is_zero(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    batch = first_batch(made)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = made.compute_loss(made.model, batch)
    assert loss.item() == 0.0
    loss.backward()
    assert not any(p.grad.any() for p in made.model.parameters() if p.grad is not None)


def test_quantised_base_goes_on_training_after_an_evaluation(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from tests.stock_cases import tiny_llama

    model = tiny_llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            packed = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
            )
            packed.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, packed.to("cpu"))
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(**ALL, init_lora_weights=False)
    small = [
        {"prompt": " ".join(f"w{4 + (7 * i + j) % 59}" for j in range(3)) + " ", "completion": "w5 w6"}
        for i in range(4)
    ]
    made = trainer(tmp_path, peft.get_peft_model(model, config), data=small, exits=[1, 2], eval_data=small)
    made.evaluate()
    made.model.train()
    before = made.compute_loss(made.model, first_batch(made))
    before.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained(made.model).values())


def test_the_model_card_names_the_method(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    made.train()
    for card in (tmp_path / "README.md", tmp_path / "checkpoint-1" / "README.md"):
        if card.exists():
            assert "soft" in card.read_text(encoding="utf-8")
    assert "2309.08968" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert {"trl", "soft"} <= set(made.model.model_tags)


def test_the_forward_without_exits_is_what_it_was(tmp_path: Path) -> None:
    model = build("llama")
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids, labels=ids)
    made = trainer(tmp_path, model)
    after = made.model(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert made.model.generate(ids, max_new_tokens=3).shape == (1, 6)


def test_plain_training_arguments_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], hub_token="secret")
    data = Dataset.from_list(rows())
    made = SoFTTrainer(build("llama"), arguments, train_dataset=data, processing_class=tokenizer())
    assert isinstance(made.args, SoFTConfig)
    assert made.args.hub_token == "secret"
    assert made.exits == [2, 3, 4, 5, 6]  # the paper's eight of six layers, each once
    given = trl.SFTConfig(str(tmp_path), eos_token="w9", max_length=17, use_cpu=True, report_to=[])
    made = SoFTTrainer(build("llama"), given, train_dataset=data, processing_class=tokenizer())
    assert (made.args.eos_token, made.args.pad_token, made.args.max_length) == ("w9", None, 17)
    monkeypatch.setattr("peft_dynamic.trainers.soft.trainer.SoFTConfig", functools.partial(SoFTConfig, use_cpu=True))
    model = build("llama")
    model.config._name_or_path = "someone/tiny"
    made = SoFTTrainer(model, train_dataset=data, processing_class=tokenizer())
    assert Path(made.args.output_dir).name == "tiny-SoFT"


def test_a_copy_of_a_trained_model_runs_itself(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    model = made.model.eval()
    ids = torch.tensor([[5, 6, 7]])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
        plain = type(model).forward(other, input_ids=ids)
        assert torch.equal(other(input_ids=ids).logits, plain.logits)
        assert not torch.equal(model(input_ids=ids).logits, plain.logits)
    batch = first_batch(made)
    for each in (model, other):
        with torch.no_grad():
            output = each(**batch, exits=[2, 6], exit_weights=[0.5, 0.5])
        expected = plain_losses(each, batch, [2, 6])
        torch.testing.assert_close(output.nll / output.tokens, expected.detach())
    small = truncate_to_exit(model, 2)
    expected = plain_losses(model, batch, [2])[0]
    with torch.no_grad():
        torch.testing.assert_close(small(**{**batch, "labels": batch["labels"]}).loss, expected.detach())
