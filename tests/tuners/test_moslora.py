"""MoSLoRA: its configuration, its start, and what training moves; the rest is in the conformance table."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_dynamic import DyLoRAConfig, MoSLoRAConfig
from tests.stock_cases import build, compute
from tests.tuners.common import losses


def mlp(**settings: object) -> nn.Module:
    return get_peft_model(
        build("linear")[0], MoSLoRAConfig(**({"r": 8, "lora_alpha": 16, "target_modules": ["a", "b"]} | settings))
    )


def mixer(model: nn.Module) -> torch.Tensor:
    return model.base_model.model.a.lora_mixer["default"].weight


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mixer_init": "zero"}, ValueError, "mixer_init='zero' never trains"),
        ({"mixer_init": "zeros"}, ValueError, "mixer_init='zeros' never trains"),
        ({"mixer_init": "xavier"}, ValueError, "mixer_init must be one of .* got 'xavier'"),
        ({"mixer_init": "butterfly", "r": 7}, ValueError, "each rank must be even; got \\[7\\]"),
        ({"ensure_weight_tying": True}, ValueError, "has a mixer of its own"),
        ({"mixer_init": "butterfly", "rank_pattern": {"a": 3}}, ValueError, "each rank must be even; got \\[3\\]"),
        ({"train_mixer": "yes"}, TypeError, "train_mixer must be True, False or None, got 'yes'"),
        ({"r": 0}, ValueError, "r must be|positive integer"),
        ({"r": 2.5}, TypeError, "r must be an int, got 2.5"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "orthogonal"}, ValueError, "init_lora_weights='orthogonal'"),
        ({"use_qalora": True}, ValueError, "does not support use_qalora=True"),
        ({"alora_invocation_tokens": [1]}, ValueError, "does not support alora_invocation_tokens"),
    ],
)
def test_a_bad_argument_is_named(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MoSLoRAConfig(**settings)


def test_dylora_refuses_a_mixer_that_it_cannot_cut() -> None:
    with pytest.raises(ValueError, match="each rank must be even; got \\[1, 3\\]"):
        DyLoRAConfig(r=4, ranks=[1, 2, 3, 4], use_mixer=True, mixer_init="butterfly")
    with pytest.raises(ValueError, match="update='frozen' trains single rows and columns, which use_mixer=True mixes"):
        DyLoRAConfig.paper(r=4, use_mixer=True, update="frozen")


def test_the_start_of_the_mixer() -> None:
    torch.manual_seed(0)
    kaiming = mixer(mlp(r=256))
    assert kaiming.shape == (1, 256, 256)
    assert kaiming.abs().max() <= 1 / math.sqrt(256)
    assert kaiming.std().item() == pytest.approx(1 / math.sqrt(3 * 256), rel=0.02)
    m = mixer(mlp(mixer_init="orthogonal"))[0]
    assert torch.allclose(m @ m.T, torch.eye(8), atol=1e-5)
    assert torch.equal(mixer(mlp(mixer_init="identity"))[0], torch.eye(8))
    eye = torch.eye(4)
    assert torch.equal(mixer(mlp(mixer_init="butterfly"))[0], torch.cat([torch.cat([eye, eye], 1)] * 2))


def test_a_butterfly_is_fixed_and_saved_and_the_update_of_two_subspaces(tmp_path: Path) -> None:
    """dW = s (B1 + B2)(A1 + A2), with the halves of the rank: the paper's two subspaces mixed."""
    model = mlp(mixer_init="butterfly")
    assert not [name for name, p in model.named_parameters() if "mixer" in name]
    layer = model.base_model.model.a
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    a, b = layer.lora_A["default"]._parameters["weight"], layer.lora_B["default"].weight
    expected = 2.0 * (b[:, :4] + b[:, 4:]) @ (a[:4] + a[4:])
    assert torch.allclose(layer.get_delta_weight("default"), expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("linear")[0], tmp_path)
    assert torch.equal(mixer(loaded), mixer(model))
    trained = mlp(mixer_init="butterfly", train_mixer=True)
    assert mixer(trained).requires_grad


def test_an_identity_that_is_not_trained_is_lora_to_the_bit() -> None:
    base, inputs = build("linear")
    torch.manual_seed(3)
    ours = get_peft_model(base, MoSLoRAConfig(r=8, target_modules=["a"], mixer_init="identity", train_mixer=False))
    torch.manual_seed(3)
    stock = get_peft_model(build("linear")[0], LoraConfig(r=8, target_modules=["a"]))
    for model in (ours, stock):
        torch.nn.init.ones_(model.base_model.model.a.lora_B["default"].weight)
    ours.base_model.model.a.lora_A["default"].weight.data.copy_(stock.base_model.model.a.lora_A["default"].weight)
    assert torch.equal(compute(ours, inputs), compute(stock, inputs))
    assert not hasattr(ours.base_model.model.a, "lora_mixer")


def test_the_first_step_moves_b_and_the_second_all_three() -> None:
    model, (_, inputs) = mlp().train(), build("linear")
    layer = model.base_model.model.a
    tensors = [layer.lora_A["default"]._parameters["weight"], mixer(model), layer.lora_B["default"].weight]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    moved = []
    for _ in range(2):
        before = [tensor.detach().clone() for tensor in tensors]
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append([not torch.equal(now, then) for now, then in zip(tensors, before, strict=True)])
    assert moved == [[False, False, True], [True, True, True]]


def test_a_forward_pass_computes_b_m_a() -> None:
    """Against the three maps written out one after another, as the authors' code has them, gradients too."""
    model = mlp(target_modules=["b"])
    layer = model.base_model.model.b
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    a, m, b = layer.lora_A["default"]._parameters["weight"], mixer_of(layer), layer.lora_B["default"].weight
    x = torch.randn(6, 32)
    model.train()
    output = layer(x)
    output.square().sum().backward()
    ours = [tensor.grad.clone() for tensor in (a, m, b)]
    for tensor in (a, m, b):
        tensor.grad = None
    expected = layer.base_layer(x) + 2.0 * (((x @ a.T) @ m[0].T) @ b.T)
    expected.square().sum().backward()
    assert torch.allclose(output, expected, atol=1e-4)
    for mine, tensor in zip(ours, (a, m, b), strict=True):
        assert torch.allclose(mine, tensor.grad, rtol=1e-3, atol=1e-4 * tensor.grad.abs().max())


def mixer_of(layer: nn.Module) -> torch.Tensor:
    return layer.lora_mixer["default"].weight


def test_two_backward_passes_of_one_step() -> None:
    """What a forward pass computed once must not be reused by the next: its graph is gone."""
    model, (_, inputs) = mlp().train(), build("linear")
    for _ in range(2):
        model(inputs).square().mean().backward()
    twice = mixer(model).grad.clone()
    model.zero_grad()
    model(inputs).square().mean().backward()
    assert torch.equal(twice, 2 * mixer(model).grad)


def test_evaluation_sees_every_change(tmp_path: Path) -> None:
    model, (_, inputs) = mlp(init_lora_weights=False).eval(), build("linear")
    model.save_pretrained(tmp_path)
    first = compute(model, inputs)
    assert torch.equal(compute(model, inputs), first)
    with torch.no_grad():
        mixer(model).mul_(2)
    second = compute(model, inputs)
    assert not torch.allclose(second, first, atol=1e-3)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(compute(model, inputs), first)
    with torch.autocast("cpu", torch.bfloat16):
        compute(model, inputs)
    assert torch.equal(compute(model, inputs), first)


def test_a_low_precision_base_has_a_single_precision_adapter() -> None:
    base, inputs = build("linear")
    model = get_peft_model(base.to(torch.bfloat16), MoSLoRAConfig(r=4, target_modules=["a", "b"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert compute(model, inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"use_dora": True}], ids=str)
def test_rslora_and_dora_work_with_a_mixer(settings: dict) -> None:
    base, inputs = build("linear")
    model = get_peft_model(base, MoSLoRAConfig(r=4, lora_alpha=8, target_modules=["a", "b"], **settings))
    stock = get_peft_model(build("linear")[0], LoraConfig(r=4, lora_alpha=8, target_modules=["a", "b"], **settings))
    assert torch.allclose(compute(model.eval(), inputs), compute(build("linear")[0], inputs), atol=1e-5)
    for name in ("a", "b"):
        ours, theirs = getattr(model.base_model.model, name), getattr(stock.base_model.model, name)
        with torch.no_grad():
            ours.lora_B["default"].weight.normal_()
            theirs.lora_B["default"].weight.copy_(ours.lora_B["default"].weight)
            theirs.lora_A["default"].weight.copy_(ours.lora_A["default"].weight)  # M A
    assert torch.allclose(compute(model, inputs), compute(stock.eval(), inputs), atol=1e-5)
    forward = compute(model, inputs)
    model.merge_adapter()
    assert torch.allclose(compute(model, inputs), forward, atol=1e-4)


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_a_weighted_adapter_is_the_sum_of_the_updates(how: str) -> None:
    model = mlp(init_lora_weights=False)
    model.add_adapter("other", MoSLoRAConfig(r=8, lora_alpha=4, target_modules=["a", "b"], init_lora_weights=False))
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "both", combination_type=how)
    layer = model.base_model.model.a
    expected = layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("other")
    if how == "cat":
        assert torch.allclose(layer.get_delta_weight("both"), expected, atol=1e-4)
    elif how == "svd":  # of rank 8, the sum's best approximation
        u, s, vh = torch.linalg.svd(expected.detach())
        best = u[:, :8] * s[:8] @ vh[:8]
        assert torch.allclose(layer.get_delta_weight("both"), best, atol=1e-3)
    else:
        shown = [layer.lora_A[name].weight for name in ("default", "other", "both")]
        root = [(layer.scaling[name] * weight) ** 0.5 for name, weight in (("default", 1.0), ("other", 0.5))]
        assert torch.allclose(shown[2], root[0] * shown[0] + root[1] * shown[1], atol=1e-4)
    assert model.peft_config["both"].mixer_init == "identity"


@given(r=st.integers(1, 12), init=st.sampled_from(["kaiming", "orthogonal", "identity", "butterfly", "none"]))
def test_every_configuration_works_or_is_refused_at_construction(r: int, init: str) -> None:
    settings = {"r": r, "mixer_init": init, "target_modules": ["a"]}
    if init == "none" or (init == "butterfly" and r % 2):
        with pytest.raises(ValueError, match="mixer_init"):
            MoSLoRAConfig(**settings)
        return
    config = MoSLoRAConfig(**settings)
    base, inputs = build("linear")
    expected = compute(base, inputs)
    assert torch.equal(compute(get_peft_model(base, config).eval(), inputs), expected)


@pytest.mark.model("smollm2")
def test_smollm2_trains_and_exports(model_path: Path, tmp_path: Path) -> None:
    from peft_dynamic import export_lora

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path)
    model = get_peft_model(base, MoSLoRAConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.randint(0, 1000, (2, 16))
    found = losses(model, 4, 3e-3, input_ids=ids, labels=ids)
    assert found[-1] < 0.8 * found[0]
    export_lora(model, tmp_path)
    with torch.no_grad():
        ours = model.eval()(ids).logits
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), tmp_path)(ids).logits
    assert torch.equal(ours, stock)
