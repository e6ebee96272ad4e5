"""What PEFT's `add_weighted_adapter` computes: docs/merging.md states these facts, and warns of most of them."""

import inspect
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from peft.utils.merge_utils import dare_linear
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.stock_cases import build

HALVES = [0.5, 0.5]


def pair(inputs: int = 2, outputs: int = 1, **settings: Any) -> tuple[Any, Any]:
    """A model with two adapters of one layer, "default" and "other", and the layer."""
    torch.manual_seed(0)
    config = {"r": 1, "lora_alpha": 1, "target_modules": ["0"]} | settings
    model: Any = get_peft_model(nn.Sequential(nn.Linear(inputs, outputs)), LoraConfig(**config))
    model.add_adapter("other", LoraConfig(**config))
    return model, model.base_model.model[0]


def fill(layer: Any, adapter: str, a: Any, b: Any) -> None:
    with torch.no_grad():
        layer.lora_A[adapter].weight.copy_(torch.tensor(a))
        layer.lora_B[adapter].weight.copy_(torch.tensor(b))


def by_hand() -> tuple[Any, Any]:
    """B A = (1 0) and (0 3), whose mean is (0.5 1.5)."""
    model, layer = pair()
    fill(layer, "default", [[1.0, 0.0]], [[1.0]])
    fill(layer, "other", [[0.0, 1.0]], [[3.0]])
    return model, layer


@pytest.mark.parametrize(("kind", "found"), [("linear", (2.0, 2.0)), ("cat", (0.5, 1.5)), ("svd", (0.5, 1.5))])
def test_linear_adds_up_factors_and_cat_and_svd_add_up_products(kind: str, found: tuple[float, float]) -> None:
    model, layer = by_hand()
    model.add_weighted_adapter(["default", "other"], HALVES, "merged", combination_type=kind)
    torch.testing.assert_close(layer.get_delta_weight("merged"), torch.tensor([found]))


def test_an_averaged_model_averages_factors() -> None:
    model, layer = by_hand()
    averaged: Any = AveragedModel(model)
    averaged.update_parameters(model)
    fill(layer, "default", [[0.0, 1.0]], [[3.0]])
    averaged.update_parameters(model)
    found = averaged.module.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0]]))


def ratio(kind: str, number: int = 0, **settings: Any) -> float:
    """How much larger the merge of one adapter at weight 1 is than the adapter, in a layer."""
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "1"], "init_lora_weights": False} | settings
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), LoraConfig(**config))
    model.add_adapter("empty", LoraConfig(**(config | {"init_lora_weights": True})))  # B = 0
    model.add_weighted_adapter(["default", "empty"], [1.0, 1.0], "merged", combination_type=kind, svd_rank=4)
    layer = model.base_model.model[number]
    before, after = (layer.get_delta_weight(name).detach() for name in ("default", "merged"))
    found = float((before * after).sum() / before.square().sum())
    torch.testing.assert_close(after, found * before, atol=1e-5, rtol=1e-4)
    return found


@pytest.mark.parametrize(("kind", "rank"), [("cat", 8), ("svd", 4)])
def test_a_merge_of_rslora_is_too_large_by_the_root_of_its_rank(kind: str, rank: int) -> None:
    assert ratio(kind, use_rslora=True) == pytest.approx(rank**0.5, abs=1e-4)
    assert ratio(kind) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_an_alpha_or_a_rank_of_one_module_counts(kind: str, number: int) -> None:
    assert ratio(kind, number, alpha_pattern={"0": 12}) == pytest.approx(1.0, abs=1e-5)
    assert ratio(kind, number, rank_pattern={"0": 2}) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_dare_masks_both_factors_so_that_a_term_survives_by_the_square_of_the_density(density: float) -> None:
    """All entries of B A are 1: those that survive are 1 / density^2, a variance of 1 / density^2 - 1."""
    model, layer = pair(4000, 3000)
    fill(layer, "default", [[1.0] * 4000], [[1.0]] * 3000)
    fill(layer, "other", [[0.0] * 4000], [[0.0]] * 3000)
    torch.manual_seed(0)
    adapters = ["default", "other"]
    model.add_weighted_adapter(adapters, [1.0, 1.0], "merged", combination_type="dare_linear", density=density)
    found = layer.get_delta_weight("merged").detach()
    kept = found[found != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, density**-2))
    assert len(kept) / found.numel() == pytest.approx(density**2, rel=0.25)
    share = len(kept) / found.numel()
    assert float(found.double().var()) == pytest.approx(share * (1 - share) * density**-4, rel=1e-4)
    # on the product, as under dare_linear_svd, a share of the density survives
    product = dare_linear([torch.ones(4000, 300)], torch.ones(1), density)
    assert float((product != 0).double().mean()) == pytest.approx(density, rel=0.05)
    torch.testing.assert_close(product.max(), torch.tensor(1 / density))


def test_a_density_of_0_gives_nan_and_one_adapter_is_not_dropped_from() -> None:
    model, layer = by_hand()
    model.add_weighted_adapter(["default", "other"], HALVES, "none", combination_type="dare_linear", density=0.0)
    assert layer.get_delta_weight("none").isnan().all()
    model.add_weighted_adapter(["default"], [1.0], "alone", combination_type="dare_linear", density=0.1)
    assert torch.equal(layer.get_delta_weight("alone"), layer.get_delta_weight("default"))


def test_no_argument_sets_the_seed_of_dare() -> None:
    arguments = inspect.signature(LoraModel.add_weighted_adapter).parameters
    assert "density" in arguments
    assert not [name for name in arguments if "seed" in name or "generator" in name]
    model, layer = pair(400, 300)
    fill(layer, "default", [[1.0] * 400], [[1.0]] * 300)
    for name in ("one", "two"):
        model.add_weighted_adapter(["default", "other"], HALVES, name, combination_type="dare_linear", density=0.5)
    assert not torch.equal(layer.lora_A["one"].weight, layer.lora_A["two"].weight)


def test_the_biases_of_lora_bias_are_left_out() -> None:
    model, layer = pair(4, 3, lora_bias=True)
    with torch.no_grad():
        for adapter in ("default", "other"):
            layer.lora_B[adapter].bias.fill_(2.0)
    model.add_weighted_adapter(["default", "other"], HALVES, "merged", combination_type="cat")
    assert not layer.lora_B["merged"].bias.any()


def test_other_ranks_and_experts_are_refused() -> None:
    model, _ = pair(4, 3)
    model.add_adapter("wide", LoraConfig(r=2, target_modules=["0"]))
    for kind in ("linear", "ties", "dare_linear", "dare_ties"):
        with pytest.raises(ValueError, match="must have the same r value"):
            model.add_weighted_adapter(["default", "wide"], HALVES, "merged", combination_type=kind, density=0.5)
    base, _ = build("experts")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[], target_parameters=["experts.up"]))
    with pytest.raises(ValueError, match=r"does not support targeting nn\.Parameter"):
        model.add_weighted_adapter(["default"], [1.0], "merged")
