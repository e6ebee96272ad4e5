"""Hosts that put something of their own in the place of a factor's weight: refused, and nothing is changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from peft_dynamic import DyLoRAConfig
from tests.conformance.cases import perturb
from tests.tuners.common import rows, tiny_llama
from tests.tuners.methods import with_method

HOSTS: dict[str, Callable[[nn.Module], Any]] = {
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "random prune": lambda module: prune.random_unstructured(module, "weight", 0.5),
    "weight_norm": lambda module: torch.nn.utils.weight_norm(module),
    "spectral_norm": lambda module: spectral_norm(module),
    "parametrized weight_norm": lambda module: parametrizations.weight_norm(module),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows(2)).logits


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("method", ["dylora", "dylora-mixer", "moslora"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_host_that_replaces_a_weight_is_refused(method: str, rank: int, host: str) -> None:
    model = with_method(method)
    perturb(model)
    if hasattr(model, "set_rank"):
        model.set_rank(rank)
    expected, names = logits(model), [name for name, _ in model.named_parameters()]
    tensors = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    layer = next(module for module in model.modules() if hasattr(module, "lora_views"))
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):
        with pytest.raises((RuntimeError, TypeError), match="weight"):
            HOSTS[host](factor)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)
    assert torch.equal(logits(model), expected)
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, tensors[key])


def test_the_refusal_says_what_to_do() -> None:
    model = get_peft_model(tiny_llama(), DyLoRAConfig(r=4, target_modules=["q_proj"]))
    factor = next(module for module in model.modules() if hasattr(module, "lora_views")).lora_A["default"]
    with pytest.raises(RuntimeError, match=r"would replace the weight.*Export the adapter with export_lora"):
        prune.l1_unstructured(factor, "weight", 0.5)
    with pytest.raises(RuntimeError, match="would replace the weight"):
        del factor.weight
    with pytest.raises((RuntimeError, TypeError)):
        factor.weight = torch.zeros(1)
    assert isinstance(factor._parameters["weight"], nn.Parameter)
