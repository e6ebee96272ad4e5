"""The table: every tuner x every kind of layer, with the facts about it that the tests need.

A test never asks which method it has; what differs between methods stands in a case.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from peft_dynamic import DyLoRAConfig
from tests.stock_cases import CASES as LAYER_KINDS
from tests.stock_cases import build

R = 8


@dataclass(frozen=True)
class Case:
    """One tuner on one kind of layer.

    Attributes:
        config: makes the configuration; its keyword arguments override the case's.
        layers: a key of `tests.stock_cases.CASES`.
        ranks: the ranks that training draws from; each is checked.
        mergeable: merging changes outputs by rounding only.
        second_adapter: PEFT lets the model have another one.
        mixed_batches: the layers take `adapter_names`.
        tolerance: absolute, of outputs of order 1 in float32.
    """

    name: str
    layers: str
    config: Callable[..., PeftConfig]
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    mergeable: bool = True
    second_adapter: bool = True
    mixed_batches: bool = True
    tolerance: float = 2e-5
    settings: dict[str, Any] = field(default_factory=dict)

    def adapted(self, **overrides: Any) -> tuple[nn.Module, torch.Tensor]:
        """The model with a fresh adapter, and an input."""
        base, inputs = build(self.layers)
        return get_peft_model(base, self.config(**(self.settings | overrides))), inputs

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


_FACTS: dict[str, dict[str, Any]] = {
    "convolutions": {"ranks": (2, 4, 8), "mergeable": False, "tolerance": 1e-4},  # PEFT does not merge grouped ones
    "attention": {"mixed_batches": False},
    "experts": {"mixed_batches": False},
    "modules_to_save": {"mixed_batches": False},  # PEFT takes adapter names there only for adapters that share them
    "trainable_tokens": {"mixed_batches": False},
    "bias": {"second_adapter": False, "mixed_batches": False},  # the base has one set of biases
}
_RULES = {"": {}, "-constant": {"scaling": "alpha/r"}, "-sqrt": {"scaling": "alpha/sqrt(r*b)"}}

CASES = [
    Case(f"dylora-{layers}", layers, _dylora, settings=kind.config, **_FACTS.get(layers, {}))
    for layers, kind in LAYER_KINDS.items()
]
CASES = [
    replace(case, settings=case.settings | {"ranks": list(case.ranks)}) if case.ranks != (1, 2, 4, 8) else case
    for case in CASES
]
CASES += [
    replace(case, name=f"dylora{suffix}-{case.layers}", settings=case.settings | rule)
    for case in CASES
    if case.layers in ("linear", "patterns")
    for suffix, rule in _RULES.items()
    if suffix
]
