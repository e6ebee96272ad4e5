"""The hosts' helpers around our adapters: PEFT's optimizers and scale contexts, GradScaler, transformers' switches."""

from pathlib import Path
from typing import Any

import peft.optimizers
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from safetensors.torch import load_model, save_model
from torch.nn.utils import parametrizations, parametrize, prune

from peft_dynamic import DyLoRAConfig, get_rank, set_rank
from tests import methods
from tests.conformance.cases import perturb
from tests.tuners.common import RankRecorder, a_layer, adapted, rows, schedule_of, tiny_llama, train, trainable_state
from tests.tuners.methods import METHODS, OF_SOURCES, with_method

COMPUTE_WITH_STORED_FACTORS = {"density-lora"}


def step(model: Any, optimizer: Any) -> None:
    model.train()(input_ids=rows(2), labels=rows(2)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_pefts_helpers_are_those_that_we_know() -> None:
    found = {name for name in dir(peft.optimizers) if name.startswith("create_")}
    assert found == {"create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"}


@pytest.mark.parametrize("method", METHODS)
def test_loraplus_sorts_our_parameters_as_it_sorts_loras(method: str) -> None:
    model = with_method(method)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    before = trainable_state(model)
    if method.startswith("loretta-rep"):
        with pytest.raises(RuntimeError, match="takes every parameter of one dimension for a part of B"):
            step(model, optimizer)
        assert all(torch.equal(value, before[name]) for name, value in trainable_state(model).items())
        return
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_b = "lora_B" in name or parameter.dim() == 1
            assert rates[id(parameter)] == (16e-3 if of_b else 1e-3), name
    step(model, optimizer)
    assert any(not torch.equal(value, before[name]) for name, value in trainable_state(model).items())


@pytest.mark.parametrize("helper", ["lorafa", "riemannian"])
@pytest.mark.parametrize("method", METHODS)
def test_optimizers_that_read_the_stored_factors_are_refused_where_these_mean_something_else(
    method: str, helper: str
) -> None:
    model = with_method(method)
    if helper == "riemannian" and (method.startswith(("loretta", "lamda")) or method in OF_SOURCES):
        with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):
            create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)
        return
    if helper == "lorafa":
        optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-2)
    else:
        optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)
    before = trainable_state(model)
    if method in COMPUTE_WITH_STORED_FACTORS:
        step(model, optimizer)
        assert any(not torch.equal(value, before[name]) for name, value in trainable_state(model).items())
        return
    if method == "loretta-adp":  # has no factors: both treat its parameters one by one
        return
    with pytest.raises(RuntimeError, match="computes with the stored lora_A and lora_B"):
        step(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in trainable_state(model).items())


@pytest.mark.parametrize("rule", ["alpha/b", "alpha/r", "alpha/sqrt(b)", "alpha/sqrt(r*b)"])
@pytest.mark.parametrize("truncation", ["svd", "prefix"])
def test_a_rank_set_inside_a_rescaling_has_its_own_scale_afterwards(rule: str, truncation: str) -> None:
    def scales(model: Any) -> list[float]:
        return [m.scaling["default"] for m in model.modules() if hasattr(m, "lora_views")]

    model = adapted(scaling=rule, truncation=truncation, lora_alpha=16)
    at = {}
    for rank in (1, 2, 4, 8):
        model.set_rank(rank)
        at[rank] = scales(model)
    with rescale_adapter_scale(model, 0.5):
        assert scales(model) == pytest.approx([0.5 * scale for scale in at[8]])
        model.set_rank(2)
        assert scales(model) == pytest.approx([0.5 * scale for scale in at[2]])
        with model.at_rank(4), rescale_adapter_scale(model, 3.0):
            assert scales(model) == pytest.approx([1.5 * scale for scale in at[4]])
        assert scales(model) == pytest.approx([0.5 * scale for scale in at[2]])
    assert scales(model) == pytest.approx(at[2])
    if rule == "alpha/b":
        assert scales(model)[0] == 8.0
    with model.at_rank(4), rescale_adapter_scale(model, 3.0):
        model.set_rank(1)
    assert scales(model) == pytest.approx(at[2])


def test_a_factor_set_on_a_layer_stays_through_ranks_and_rescaling() -> None:
    model = adapted(scaling="alpha/b", lora_alpha=16)
    layer = a_layer(model)
    layer.set_scale("default", 3.0)
    model.set_rank(2)
    assert layer.scaling["default"] == 24.0
    with rescale_adapter_scale(model, 0.5):
        model.set_rank(4)
        assert layer.scaling["default"] == 6.0
    assert layer.scaling["default"] == 12.0
    layer.scale_layer(2.0)
    model.set_rank(8)
    assert layer.scaling["default"] == 12.0
    layer.unscale_layer()
    assert layer.scaling["default"] == 2.0


HEAD = {"modules_to_save": ["lm_head"]}
SWITCHED = methods.configs(["q_proj"], own={"dylora": HEAD, "moslora": HEAD})


@pytest.mark.parametrize("method", SWITCHED)
def test_transformers_switches_all_of_an_adapter_off_and_on(method: str) -> None:
    base = tiny_llama().eval()
    with torch.no_grad():
        plain = base(input_ids=rows(2)).logits
        base.add_adapter(SWITCHED[method]())
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        trained = {name for name, p in base.named_parameters() if p.requires_grad}
        expected = base.eval()(input_ids=rows(2)).logits
        assert not torch.allclose(expected, plain, atol=1e-3)
        for _ in range(2):
            base.disable_adapters()
            torch.testing.assert_close(base(input_ids=rows(2)).logits, plain)
            base.enable_adapters()
            torch.testing.assert_close(base(input_ids=rows(2)).logits, expected)
    assert {name for name, p in base.named_parameters() if p.requires_grad} == trained


def test_frozen_over_two_optimizers_is_refused() -> None:
    model = adapted(update="frozen")
    factors = {part: [p for n, p in model.named_parameters() if part in n] for part in ("lora_A", "lora_B")}
    optimizers = [torch.optim.AdamW(some, lr=1e-2) for some in factors.values()]
    before = trainable_state(model)
    model.train()(input_ids=rows(2), labels=rows(2)).loss.backward()
    with pytest.raises(RuntimeError, match=r"holds some of them only: .*_proj is not in it"):
        optimizers[0].step()
    assert all(torch.equal(value, before[name]) for name, value in trainable_state(model).items())
    for parameter in factors["lora_A"]:
        parameter.requires_grad_(False)
    optimizers[1].step()  # what is frozen need not be in it
    assert schedule_of(model).updates == 1


def test_two_optimizers_draw_one_rank_for_each_step() -> None:
    expected = RankRecorder(model := adapted())
    train(model, 6)
    model = adapted()
    found = RankRecorder(model)
    for order in ("lora_A", "lora_B"), ("lora_B", "lora_A"):
        optimizers = [torch.optim.SGD([p for n, p in model.named_parameters() if part in n], lr=1e-3) for part in order]
        for _ in range(3):
            model.train()(input_ids=rows(2), labels=rows(2)).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    assert found.training == expected.training
    assert schedule_of(model).updates == 6


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_not_counted(fused: bool) -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = trainable_state(model)
    drawn = model.drawn_rank()
    for overflows, steps in ((True, 0), (False, 1), (True, 1), (False, 2)):
        loss = model.train()(input_ids=rows(2), labels=rows(2)).loss
        scaler.scale(loss * (float("inf") if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert schedule_of(model).updates == steps
        if steps == 0:
            assert model.drawn_rank() == drawn
            assert all(torch.equal(value, before[name]) for name, value in trainable_state(model).items())


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), "infinite values")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_run_that_diverged_names_the_layer_and_the_step(factor: str, value: float, what: str) -> None:
    model = adapted(rank_sampling=[1.0, 1.0, 1.0, 0.0])
    optimizer = train(model, 3)
    module = model.base_model.model.model.layers[1].mlp.up_proj
    model.train()(input_ids=rows(2), labels=rows(2)).loss.backward()
    getattr(module, factor)["default"]._parameters["weight"].grad.fill_(value)
    message = rf"{factor} of model.layers.1.mlp.up_proj holds {what} after optimizer step 4 .*lower the learning rate"
    if what != "NaN":  # AdamW makes NaN of it at once
        message = rf"{factor} of model.layers.1.mlp.up_proj holds (NaN|infinite values) after optimizer step 4 "
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_ranks_on_a_model_of_transformers_follow_the_switches() -> None:
    base = tiny_llama()
    base.add_adapter(DyLoRAConfig(r=4, target_modules=["q_proj"]))
    set_rank(base, 2)
    base.disable_adapters()
    base.enable_adapters()
    assert get_rank(base) == 2


@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])
def test_a_deepspeed_engine_whose_steps_are_not_seen_is_refused(mark: str) -> None:
    """By the marks that ZeRO-1 and 2, and ZeRO-3, of DeepSpeed 0.19 leave on the parameters that they hold."""
    model = adapted()
    for parameter in model.parameters():
        if parameter.requires_grad:
            setattr(parameter, mark, None)
    flat = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([flat])
    for _ in range(2):
        model.train()(input_ids=rows(2))
        optimizer.step()
    model.train()(input_ids=rows(2))
    with pytest.raises(RuntimeError, match=r"DeepSpeed has stepped 3 times .* it still trains its first rank, 4"):
        optimizer.step()


@pytest.mark.parametrize("method", ["moslora", "loretta-rep", "dylora", "dylora-mixer"])
def test_factors_that_deepspeed_has_parted_are_named(method: str) -> None:
    model = with_method(method)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.ds_id = 0
            parameter.data = torch.empty(0)
    if hasattr(model, "set_rank"):
        model.set_rank(2)
    with pytest.raises(RuntimeError, match=r"DeepSpeed ZeRO-3 holds the factors of \S+ in parts"):
        model.eval()(input_ids=rows(2))
    other = with_method(method)  # no affair of another model's
    step(other, torch.optim.AdamW(other.parameters()))


REPLACING = {
    "prune": lambda factor: prune.l1_unstructured(factor, "weight", amount=0.5),
    "parametrize": lambda factor: parametrize.register_parametrization(factor, "weight", torch.nn.Tanh()),
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("how", REPLACING)
@pytest.mark.parametrize("method", METHODS)
def test_what_replaces_a_weight_acts_on_a_stored_one_or_is_refused(method: str, how: str) -> None:
    if method == "loretta-adp":
        return  # which has no factors
    model = with_method(method)
    perturb(model)
    if hasattr(model, "set_rank"):
        model.set_rank(2)
    factor = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    before, names = model.eval()(input_ids=rows(2)).logits, [name for name, _ in model.named_parameters()]
    if method == "density-lora":  # whose factors are what is stored
        REPLACING[how](factor)
        return
    # torch's own words for a tensor train, which has no parameter of that name
    kinds = (RuntimeError, ValueError, KeyError) if method.startswith("loretta") else RuntimeError
    with pytest.raises(kinds, match=r"torch.nn.utils.* would replace the weight|does not have a parameter|^'weight'$"):
        REPLACING[how](factor)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(input_ids=rows(2)).logits, before)


@pytest.mark.parametrize("method", METHODS)
def test_safetensors_saves_and_loads_what_is_stored(method: str, tmp_path: Path) -> None:
    model, other = with_method(method), with_method(method)
    perturb(model)
    if hasattr(model, "set_rank"):
        model.set_rank(2)
        other.set_rank(2)
    other.eval()(input_ids=rows(2))  # something is kept of the old weights
    save_model(model, str(tmp_path / "all.safetensors"))
    load_model(other, str(tmp_path / "all.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(input_ids=rows(2)).logits, model.eval()(input_ids=rows(2)).logits)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
