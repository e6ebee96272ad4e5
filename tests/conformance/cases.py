"""The table: every tuner x every kind of layer, with the facts about it that the tests need.

A test never asks which method it has; what differs between methods stands in a case.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from peft_dynamic import DensityLoRAConfig, DyLoRAConfig, LorettaRepConfig, MoSLoRAConfig
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
        exact_start: a fresh adapter leaves the base output bit for bit, not only up to rounding.
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


def _dylora(**settings: Any) -> PeftConfig:
    return DyLoRAConfig(**({"r": R, "ranks": [1, 2, 4, 8], "lora_alpha": 16} | settings))


def _paper(**settings: Any) -> PeftConfig:
    return DyLoRAConfig.paper(**({"r": R, "ranks": [1, 2, 4, 8], "lora_alpha": 16} | settings))


def _mixed(**settings: Any) -> PeftConfig:
    return _dylora(use_mixer=True, **settings)


def _mixed_paper(**settings: Any) -> PeftConfig:
    return _paper(use_mixer=True, mixer_init="orthogonal", **settings)


def _moslora(**settings: Any) -> PeftConfig:
    return MoSLoRAConfig(**({"r": R, "lora_alpha": 16} | settings))


def _density(**settings: Any) -> PeftConfig:
    # Weight 0: these models have no loss of their own, and a loss made from their outputs would lack the term
    return DensityLoRAConfig(**({"r": R, "lora_alpha": 16, "density_weight": 0.0, "include_padding": True} | settings))


def _rep(**settings: Any) -> PeftConfig:
    return LorettaRepConfig(**({"bottleneck": 4, "tensor_rank": 2} | settings))


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


def _case(name: str, layers: str, config: Callable[..., PeftConfig], **facts: Any) -> Case:
    facts = _FACTS.get(layers, {}) | facts
    ranked = facts.get("ranked", True)
    if not ranked:
        facts["ranks"] = (R,)
    ranks = {"ranks": list(facts["ranks"])} if ranked and "ranks" in facts else {}
    settings = LAYER_KINDS[layers].config | ranks | facts.pop("settings", {})
    return Case(f"{name}-{layers}", layers, config, settings=settings, **facts)


CASES = [_case("dylora", layers, _dylora) for layers in LAYER_KINDS]
CASES += [_case("dylora-paper", layers, _paper, prefix=True) for layers in LAYER_KINDS]
CASES += [
    _case(f"dylora-{rule}", layers, _paper, prefix=True, settings={"scaling": rule})
    for rule in ("alpha/r", "alpha/sqrt(b)", "alpha/sqrt(r*b)")
    for layers in ("linear", "patterns")
]
# The mixer, with DyLoRA's two truncations and alone.
CASES += [_case("dylora-mixer", layers, _mixed) for layers in LAYER_KINDS]
CASES += [_case("dylora-paper-mixer", layers, _mixed_paper, prefix=True) for layers in LAYER_KINDS]
CASES += [_case("moslora", layers, _moslora, ranked=False) for layers in LAYER_KINDS]
CASES += [
    _case(f"moslora-{init}", layers, _moslora, ranked=False, settings={"mixer_init": init})
    for init in ("orthogonal", "identity", "butterfly")
    for layers in ("linear", "patterns", "embedding", "convolutions", "experts")
]
# A density loss counts the outputs of a named module where there are no feed-forward blocks.
COUNTED = {"convolutions": "c2", "attention": "head", "experts": "first", "llama": None}
CASES += [
    _case("density", layers, _density, ranked=False, settings={"activation_modules": COUNTED.get(layers, "a")})
    for layers in LAYER_KINDS
]
# Linear layers only. Its layer norms are trained, of which PEFT does not take several in one batch.
LINEAR_KINDS = ("linear", "modules_to_save", "bias", "lora_bias", "trainable_tokens", "patterns", "transposed", "llama")
CASES += [
    _case(
        name,
        layers,
        _rep,
        ranked=False,
        settings=settings,
        exact_start=not settings,
        **({"mixed_batches": False} if layers == "llama" else {}),
    )
    for name, settings in (("loretta-rep", {}), ("loretta-rep-noise-removal", {"init_weights": "noise_removal"}))
    for layers in LINEAR_KINDS
]
