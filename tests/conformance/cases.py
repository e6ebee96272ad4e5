"""The table: every tuner x every kind of layer, with the facts about it that the tests need.

A test never asks which method it has; what differs between methods stands in a case.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from tests import methods
from tests.stock_cases import CASES as LAYER_KINDS
from tests.stock_cases import build

R = 8


@dataclass(frozen=True)
class Case:
    """One tuner on one kind of layer.

    Attributes:
        config: makes the configuration; its keyword arguments override the case's.
        layers: a key of `tests.stock_cases.CASES`.
        ranks: the ranks that training draws from; each is checked. One for a method without a choice.
        ranked: the model has `set_rank`.
        prefix: a rank is a prefix of the stored factors; otherwise it is the best approximation of the full update.
        mergeable: merging changes outputs by rounding only.
        second_adapter: PEFT lets the model have another one.
        difference_quotient: the gradient can be checked against one in double precision.
        mixed_batches: the layers take `adapter_names`.
        base_start: a fresh adapter computes what the base model does.
        exact_start: it does so bit for bit, not only up to rounding.
        tolerance: absolute, of outputs of order 1 in float32.
    """

    name: str
    layers: str
    config: Callable[..., PeftConfig]
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    ranked: bool = True
    prefix: bool = False
    mergeable: bool = True
    second_adapter: bool = True
    difference_quotient: bool = True
    mixed_batches: bool = True
    base_start: bool = True
    exact_start: bool = True
    tolerance: float = 2e-5
    settings: dict[str, Any] = field(default_factory=dict)

    def adapted(self, **overrides: Any) -> tuple[nn.Module, torch.Tensor]:
        """The model with a fresh adapter, and an input."""
        base, inputs = build(self.layers)
        return get_peft_model(base, self.config(**(self.settings | overrides))), inputs

    def at(self, model: Any, rank: int) -> Any:
        """`with case.at(model, rank):` the model computes at that rank."""
        return model.at_rank(rank) if self.ranked else nullcontext()

    def perturbed(self, **overrides: Any) -> tuple[nn.Module, torch.Tensor]:
        """The model with an adapter that does something, in eval mode."""
        model, inputs = self.adapted(**overrides)
        perturb(model)
        return model.eval(), inputs


def perturb(model: nn.Module, seed: int = 1) -> None:
    """Random values for all that training would change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


_RANKED = {"r": R, "ranks": [1, 2, 4, 8], "lora_alpha": 16}
_ONE_RANK = {"r": R, "lora_alpha": 16}
OWN = {
    "lamda": {"r": 4, "lora_alpha": 16},
    "dylora": _RANKED,
    "moslora": _ONE_RANK,
    # Weight 0: these models have no loss of their own, and a loss made from their outputs would lack the term
    "density-lora": _ONE_RANK | {"density_weight": 0.0, "include_padding": True},
    "scalearn": _ONE_RANK,
}


@cache
def makers(layers: str) -> dict[str, Callable[..., PeftConfig]]:
    """Method -> a function that makes its configuration, for the model of a kind of layers."""
    variations = ("dylora-paper", "dylora-mixer", "lamda", "loretta-rep-noise")
    return methods.configs(None, variations=variations, lora=True, sources=lambda: build(layers)[0], own=OWN)


MAKERS = [*makers("linear")]


_FACTS: dict[str, dict[str, Any]] = {
    "convolutions": {  # grouped ones among them, which PEFT does not merge, and which cannot use rank 1
        "ranks": (2, 4, 8),
        "mergeable": False,
        "tolerance": 1e-4,
    },
    # PEFT 0.21 puts out_proj's update into the weight twice, the second time outside autograd, in stock LoRA too
    "attention": {"mixed_batches": False, "difference_quotient": False},
    # its norms and softmax compute in single precision whatever the model's
    "llama": {"difference_quotient": False},
    "experts": {"mixed_batches": False},
    "modules_to_save": {"mixed_batches": False},  # PEFT takes adapter names there only for adapters that share them
    "trainable_tokens": {"mixed_batches": False},
    "bias": {"second_adapter": False, "mixed_batches": False},  # the base has one set of biases
}


# Linear layers only. Its layer norms are trained, of which PEFT does not take several in one batch.
LINEAR_KINDS = ("linear", "modules_to_save", "bias", "lora_bias", "trainable_tokens", "patterns", "transposed", "llama")
# Sources are products of two factors, and have no biases.
PRODUCTS = [layers for layers in LAYER_KINDS if layers != "lora_bias"]
KINDS: dict[str, Any] = {"LORETTA_REP": LINEAR_KINDS, "SCALEARN": PRODUCTS}
OF_VARIATIONS = {"lamda": [layers for layers in LINEAR_KINDS if layers != "lora_bias"]}  # refused: it was not tried
# A density loss counts the outputs of a named module where there are no feed-forward blocks.
COUNTED = {"convolutions": "c2", "attention": "head", "experts": "first", "llama": None}


# What differs between methods.
_FACTS_OF_METHODS: dict[str, dict[str, Any]] = {
    "dylora-paper": {"prefix": True},
    "loretta-rep-noise": {"exact_start": False},
    "scalearn": {"base_start": False},
}


def _of_method(name: str, layers: str) -> dict[str, Any]:
    """The facts of a method, and of a method on a kind of layer."""
    row = methods.method_of(name)
    facts = {"ranked": row.ranked} | _FACTS_OF_METHODS.get(name, {})
    if row.name == "DENSITY_LORA":
        facts["settings"] = {"activation_modules": COUNTED.get(layers, "a")}
    if row.name == "LORETTA_REP" and layers == "llama":
        facts["mixed_batches"] = False
    return facts


def _case(method: str, layers: str, name: str = "", **settings: Any) -> Case:
    facts = _FACTS.get(layers, {}) | _of_method(method, layers)
    ranked = facts.get("ranked", True)
    if not ranked:
        facts["ranks"] = (R,)
    ranks = {"ranks": list(facts["ranks"])} if ranked and "ranks" in facts else {}
    settings = LAYER_KINDS[layers].config | ranks | facts.pop("settings", {}) | settings
    return Case(f"{name or method}-{layers}", layers, makers(layers)[method], settings=settings, **facts)


CASES = [
    _case(method, layers)
    for method in MAKERS
    for layers in OF_VARIATIONS.get(method) or KINDS.get(methods.method_of(method).name, LAYER_KINDS)
]
CASES += [
    _case("dylora-paper", layers, f"dylora-{rule}", scaling=rule)
    for rule in ("alpha/r", "alpha/sqrt(b)", "alpha/sqrt(r*b)")
    for layers in ("linear", "patterns")
]
# The mixer with the paper's truncation too.
CASES += [
    _case("dylora-paper", layers, "dylora-paper-mixer", use_mixer=True, mixer_init="orthogonal")
    for layers in LAYER_KINDS
]
CASES += [
    _case("moslora", layers, f"moslora-{init}", mixer_init=init)
    for init in ("orthogonal", "identity", "butterfly")
    for layers in ("linear", "patterns", "embedding", "convolutions", "experts")
]
