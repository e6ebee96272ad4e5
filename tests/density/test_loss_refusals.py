"""Settings and models that a density loss does not take, and the modules that a pattern names."""

from typing import Any

import pytest
import torch
from torch import nn

from peft_dynamic.density import ActivationDensityLoss
from tests.density.models import EPS, WEIGHT, assert_same, attached, batch_for, build, gradients


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1}, "weight must be a number of at least 0, got -1"),
        ({"weight": True}, "weight must be a number"),
        ({"eps": 0}, "eps must be a positive number, got 0"),
        ({"surrogate": "l0"}, "surrogate must be one of"),
        ({"activation_modules": []}, "activation_modules is empty"),
        ({"activation_modules": 3}, "activation_modules must be"),
        ({"layer_weights": [0.0, 0.0]}, "some of them above 0"),
        ({"layer_weights": "all"}, "layer_weights must be a list"),
    ],
)
def test_settings_without_a_meaning(settings: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ActivationDensityLoss(**settings)


def test_models_and_settings_that_do_not_fit() -> None:
    model = build("Bert")
    with pytest.raises(ValueError, match="one number for each of the 2 layers"):
        attached(model, layer_weights=[1.0])
    with pytest.raises(ValueError, match=r"'layer\.9', which is the name of no counted layer"):
        attached(model, layer_weights={"layer.9": 1.0})
    with pytest.raises(ValueError, match="activation_modules='nothing' matches no module"):
        attached(model, activation_modules="nothing")
    assert not any(module._forward_hooks for module in model.modules())
    density = attached(model)
    with pytest.raises(ValueError, match="attached already"):
        density.attach(model)
    with pytest.raises(ValueError, match="activation_modules=None needs a model with a list of blocks"):
        attached(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    from transformers import MixtralConfig, MixtralForCausalLM

    mixture = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="mixture of experts"):
        attached(mixture)


@pytest.mark.parametrize(
    "pattern", ["intermediate_act_fn", ["intermediate.intermediate_act_fn"], r".*layer\.\d\..*act_fn"]
)
def test_patterns(pattern: Any) -> None:
    assert len(attached(build("Bert"), activation_modules=pattern).layers) == 2
    assert attached(build("Bert"), activation_modules=r".*layer\.1\..*act_fn").layers == [
        "bert.encoder.layer.1.intermediate.intermediate_act_fn"
    ]


def test_a_plain_model_with_a_pattern() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(7, 3)
    a = torch.relu(model[0](x))
    (model[2](a).pow(2).mean() + WEIGHT * (a**2 / (a**2 + EPS)).mean()).backward()
    wanted = gradients(model)
    density = attached(model, activation_modules="1")
    (model(x).pow(2).mean() + density.penalty()).backward()
    assert_same(gradients(model), wanted)


def test_what_cannot_have_a_gradient_says_so() -> None:
    batch = batch_for("Bert")
    model = build("Bert").requires_grad_(False)
    model.classifier.requires_grad_(True)
    attached(model)
    with pytest.raises(RuntimeError, match="nothing that is trained lies in front"):
        model(**batch)
    model = build("Bert")
    attached(model, add_to_loss=False)
    inner = model.bert.encoder
    with pytest.raises(RuntimeError, match="outside of the model that the density loss is attached to"):
        inner(torch.randn(2, 3, 32, requires_grad=True))
    with pytest.raises(ValueError, match="the mask of shape"):
        model(inputs_embeds=torch.randn(1, 3, 32), attention_mask=torch.ones(1, 3, 3))
