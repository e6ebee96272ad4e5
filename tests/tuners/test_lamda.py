"""LaMDA and LoRA-XS as switches of MoSLoRA: the start, what freezes when, and what a backward pass keeps.

Saving, resuming, checkpointing, compiling and engines are in the suites of all methods, as "lamda".
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

from peft_dynamic import MoSLoRAConfig, resize_adapter
from peft_dynamic.tuners.moslora.freeze import FreezeSchedule
from tests.stock_cases import build
from tests.tuners.common import rows, tiny_llama


def diagonal(**settings: Any) -> Any:
    """Over W = diag(3, 1), at rank 1 and a scale of 2."""
    base = nn.Sequential(nn.Linear(2, 2, bias=False))
    base[0].weight.data = torch.diag(torch.tensor([3.0, 1.0]))
    defaults = {"r": 1, "lora_alpha": 2, "target_modules": ["0"], "total_steps": 10}
    return get_peft_model(base, MoSLoRAConfig.lamda(**(defaults | settings))).base_model.model[0]


def llama(**settings: Any) -> Any:
    defaults = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(tiny_llama(), MoSLoRAConfig.lamda(**(defaults | settings)))


def named(model: nn.Module, part: str) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if part in name}


def test_the_update_of_a_diagonal_weight() -> None:
    """A = (1 0), B = (1 0)^T, S = 0.5, s = 2, x = (2, 5): s B S A x = 2 * 0.5 * 2 = 2 in the first place."""
    layer = diagonal()
    assert torch.equal(layer.lora_A["default"]._parameters["weight"], torch.tensor([[1.0, 0.0]]))
    assert torch.equal(layer.lora_B["default"]._parameters["weight"], torch.tensor([[1.0], [0.0]]))
    x = torch.tensor([[2.0, 5.0]])
    assert torch.equal(layer(x), layer.base_layer(x))  # S starts at 0
    layer.lora_mixer["default"].weight.data.fill_(0.5)
    assert torch.equal(layer(x) - layer.base_layer(x), torch.tensor([[2.0, 0.0]]))


def test_a_mixer_of_zero_has_a_gradient() -> None:
    """d/dS of the sum of outputs is s B^T 1 (A x)^T = 2 * 1 * 2."""
    layer = diagonal().train()
    layer(torch.tensor([[2.0, 5.0]])).sum().backward()
    assert layer.lora_mixer["default"].weight.grad.item() == 4


@pytest.mark.parametrize(
    ("rank", "share", "total", "expected"),
    [
        (4, 0.3, 20, [0, 0, 1, 2, 2, 3, 4, 4]),  # 4 i / 6
        (4, 0.1, 30, [0, 1, 2, 4, 4]),  # 4 i / 3: 0.1 * 30 is above 3 in floating point
        (2, 1, 4, [0, 0, 1, 1, 2]),
        (64, 0.3, 1, [0, 64]),
    ],
)
def test_how_many_columns_stand_still(rank: int, share: float, total: int, expected: list[int]) -> None:
    schedule, found = FreezeSchedule(share, total), []
    for _ in expected:
        found.append(schedule.frozen(rank))
        assert schedule.moving(rank, torch.device("cpu")).tolist() == [i >= found[-1] for i in range(rank)]
        schedule.advance()
    assert found == expected


def test_columns_stand_still_to_the_bit_under_adamw_with_decay() -> None:
    """t(i) = 0 1 2 3 4 with r = 4 and a share of 4 / 8 steps; the others move, and A never does."""
    model = llama(freeze_b=0.5, total_steps=8).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    start, held = named(model, "lora_A"), [named(model, "lora_B")]
    for frozen in range(6):
        model(input_ids=rows(2), labels=rows(2)).loss.backward()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                moving = parameter.grad.abs().amax(0) > 0
                # the mixer is 0 before the first step, and so is B's gradient
                assert moving.tolist() == [bool(held[1:]) and column >= frozen for column in range(4)], name
        optimizer.step()
        optimizer.zero_grad()
        held.append(named(model, "lora_B"))
    for frozen, (before, after) in enumerate(pairwise(held)):
        for name in before:
            same = (before[name] == after[name]).all(0)
            assert same.tolist() == [column < frozen for column in range(4)], (frozen, name)
    assert all(torch.equal(value, start[name]) for name, value in named(model, "lora_A").items())


def test_a_stands_still_whoever_makes_it_trained_again() -> None:
    model = llama(total_steps=8).train()
    start = named(model, "lora_A")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(input_ids=rows(2), labels=rows(2)).loss.backward()
        optimizer.step()
    assert all(torch.equal(value, start[name]) for name, value in named(model, "lora_A").items())


def test_what_is_trained_stays_so_when_adapters_are_switched() -> None:
    model = llama(freeze_b=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"lora_mixer"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 4 * 4  # r * r a module
    model.add_adapter("other", MoSLoRAConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".default." in name)
    model.set_adapter("default")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    model.delete_adapter("other")
    with model.disable_adapter():
        pass
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def trainer_of(model: Any, folder: Path, **settings: Any) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in rows(16)]
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    args = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **(arguments | settings))
    return Trainer(model, args, train_dataset=data)


def test_trainer_tells_how_many_steps_there_will_be(tmp_path: Path) -> None:
    """Of DEFAULT_CALLBACKS, with which every Trainer begins: a fact about transformers that we rely on."""
    model = llama(freeze_b=0.5)
    assert [callback.__name__ for callback in DEFAULT_CALLBACKS].count("TotalSteps") == 1
    (schedule,) = [module for module in model.modules() if isinstance(module, FreezeSchedule)]
    trainer_of(model, tmp_path / "one").train()
    assert (schedule.total, schedule.steps, schedule.frozen(4)) == (4, 4, 4)
    given = llama(freeze_b=0.5, total_steps=100)
    trainer_of(given, tmp_path / "two").train()
    (schedule,) = [module for module in given.modules() if isinstance(module, FreezeSchedule)]
    assert (schedule.total, schedule.frozen(4)) == (100, 0)


def test_a_resumed_run_is_told_again(tmp_path: Path) -> None:
    def trained(folder: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        trainer = trainer_of(llama(freeze_b=0.75), tmp_path / folder, save_steps=2)
        trainer.train(**kwargs)
        return {name: p.detach() for name, p in trainer.model.named_parameters() if "lora_" in name}

    whole = trained("whole")
    again = trained("again", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_loop_that_tells_nothing_is_refused_before_a_step() -> None:
    model = llama().train()
    with pytest.raises(RuntimeError, match=r"freeze_b=0.3 is a share .* Pass total_steps .* Nothing has been trained"):
        model(input_ids=rows(2))
    model.eval()(input_ids=rows(2))


def kept_rows(config: LoraConfig, tokens: int) -> int:
    """How many numbers with a row for each token the backward pass of one layer needs, beyond the base layer's."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[0] == tokens:
            found[tensor.data_ptr()] = tensor.numel()
        return tensor

    layer = get_peft_model(nn.Sequential(nn.Linear(64, 48)), config).base_model.model[0].train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(tokens, 64, requires_grad=True)).sum().backward()
    return sum(found.values())


def test_a_backward_pass_keeps_r_numbers_a_token_in_place_of_the_inputs() -> None:
    settings = {"r": 4, "target_modules": ["0"]}
    assert kept_rows(LoraConfig(**settings), 100) == 100 * (64 + 4)
    lamda = MoSLoRAConfig.lamda(total_steps=10, **settings)
    assert kept_rows(lamda, 100) == 100 * 4
    assert kept_rows(MoSLoRAConfig.lamda(total_steps=10, lora_dropout=0.1, **settings), 100) >= 100 * 64  # its mask


def test_the_singular_vectors_are_those_of_the_weight() -> None:
    model = llama(total_steps=10)
    for layer in (module for module in model.modules() if "default" in getattr(module, "lora_mixer", ())):
        a, b = layer.lora_A["default"]._parameters["weight"], layer.lora_B["default"]._parameters["weight"]
        weight = layer.base_layer.weight
        core = b.T @ weight @ a.T  # the leading singular values, in order
        assert torch.allclose(core, torch.diag(torch.linalg.svdvals(weight)[:4]), atol=1e-5)
        assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-5)
        assert torch.allclose(b.T @ b, torch.eye(4), atol=1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_a_transposed_weight_is_read_as_such() -> None:
    model = get_peft_model(build("transposed")[0], MoSLoRAConfig.lamda(r=2, target_modules=["a"], freeze_b=0))
    layer = model.base_model.model.a
    a, b = layer.lora_A["default"]._parameters["weight"], layer.lora_B["default"]._parameters["weight"]
    values = torch.linalg.svdvals(layer.base_layer.weight)[:2]
    assert torch.allclose(b.T @ layer.base_layer.weight.T @ a.T, torch.diag(values), atol=1e-5)


def test_resize_adapter_cuts_it_to_any_rank(tmp_path: Path) -> None:
    model = llama(freeze_b=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.eval().save_pretrained(tmp_path / "lamda")
    resize_adapter(tmp_path / "lamda", tmp_path / "whole", rank=4)
    resize_adapter(tmp_path / "lamda", tmp_path / "half", rank=2)
    with torch.no_grad():
        expected = model(input_ids=rows(2)).logits
        whole = PeftModel.from_pretrained(tiny_llama(), tmp_path / "whole").eval()
        assert torch.allclose(whole(input_ids=rows(2)).logits, expected, atol=1e-5)
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path / "half").peft_config["default"].r == 2


def test_adapters_are_combined_as_others_are() -> None:
    model = llama(freeze_b=0, init_lora_weights="spectral")
    nn.init.normal_(next(p for p in model.parameters() if p.requires_grad))
    model.add_weighted_adapter(["default"], [2.0], "twice", combination_type="cat")
    layer = next(module for module in model.modules() if "default" in getattr(module, "lora_mixer", ()))
    assert torch.allclose(layer.get_delta_weight("twice"), 2 * layer.get_delta_weight("default"), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "spectral"}, "with mixer_init='kaiming' would change the model at the start"),
        ({"mixer_init": "zero"}, "mixer_init='zero' never trains"),
        ({"mixer_init": "zeros", "init_lora_weights": "spectral"}, "mixer_init='zeros' never trains"),
        ({"mixer_init": "zero", "init_lora_weights": "spectral", "train_mixer": False}, "is an update of 0 for good"),
        ({"freeze_b": 0.3}, "freeze_b=0.3 with init_lora_weights=True is neither"),
        ({"freeze_b": 0.3, "init_lora_weights": "spectral", "mixer_init": "zero"}, "with train_a=True is neither"),
        ({"freeze_b": -0.1}, "freeze_b must be a number from 0 to 1"),
        ({"freeze_b": 1.5}, "freeze_b must be a number from 0 to 1"),
        ({"freeze_b": float("nan")}, "freeze_b must be a number from 0 to 1"),
        ({"freeze_b": True}, "freeze_b must be a number from 0 to 1"),
        ({"total_steps": 5}, "total_steps=5 with freeze_b=None has no meaning"),
        ({"total_steps": 0}, "total_steps must be an int of at least 1"),
        ({"train_a": "no"}, "train_a must be"),
        ({"train_a": False, "use_dora": True}, "train_a=False with use_dora=True was not tried"),
        ({"train_a": False, "lora_bias": True}, "train_a=False with lora_bias=True was not tried"),
        ({"train_a": False, "target_parameters": ["w"]}, r"train_a=False with target_parameters=\['w'\] was not tried"),
    ],
)
def test_what_has_no_meaning_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MoSLoRAConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("embedding", {"r": 2}, "init_lora_weights='spectral' is for linear layers.* Embedding"),
        ("embedding", {"r": 2, "init_lora_weights": True, "mixer_init": "identity", "freeze_b": None}, "train_a=False"),
        ("convolutions", {"r": 2}, "is for linear layers.* Conv"),
        ("attention", {"r": 2}, "is for linear layers.* MultiheadAttention"),
        ("linear", {"r": 8}, r"r=8: .* a weight of shape \(5, 16\) has 5"),
    ],
)
def test_a_layer_that_cannot_have_it_is_refused_and_nothing_is_changed(kind: str, settings: dict, message: str) -> None:
    base, _ = build(kind)
    before = {name: type(module) for name, module in base.named_modules()}
    targets = {"embedding": ["emb"], "convolutions": ["c2"], "attention": ["attention"], "linear": ["a", "head"]}[kind]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, MoSLoRAConfig.lamda(target_modules=targets, **settings))
    assert {name: type(module) for name, module in base.named_modules()} == before


def test_a_weight_with_nan_is_refused() -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    base[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="one holds NaN or infinite values"):
        get_peft_model(base, MoSLoRAConfig.lamda(r=2, target_modules=["0"]))
