"""What diffusers saves of our adapters, by PEFT's state dict, is the stock LoRA that the model computes."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn

from peft_dynamic.tuners.dylora import set_rank
from tests import methods
from tests.conformance.cases import perturb


class Block(nn.Module):
    """A part of a denoiser: linear layers and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.to_q, self.to_v = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, 4, 5, 5)
        hidden = self.conv(x).flatten(2).mT
        return self.to_v(torch.relu(self.to_q(hidden)))


Denoiser = type("UNet2DConditionModel", (Block,), {"__module__": "diffusers.models.unets.unet_2d_condition"})
LINEAR = ["to_q", "to_v"]
EVERYWHERE = {"lora_alpha": 8, "target_modules": ["conv", *LINEAR]}
CONFIGS = methods.configs(
    LINEAR,
    variations=("dylora-paper", "dylora-mixer", "loretta-rep-noise"),
    lora=True,
    own={
        "dylora": EVERYWHERE,
        "dylora-mixer": {"lora_alpha": 4},
        "moslora": EVERYWHERE,
        "density-lora": {"lora_alpha": 8, "activation_modules": ["to_q"]},
    },
)


def denoiser() -> Any:
    torch.manual_seed(0)
    return Denoiser().eval()


def read_as_diffusers_does(tensors: dict[str, torch.Tensor]) -> Any:
    """Keys of lora_A and lora_B alone; the rank by shape, and lora_alpha equal to it."""
    kept = {key: value for key, value in tensors.items() if ".lora_A." in key or ".lora_B." in key}
    assert kept.keys() == tensors.keys(), "diffusers would drop these"
    ranks = {key.split(".lora_A.")[0]: len(value) for key, value in kept.items() if ".lora_A." in key}
    first = next(iter(ranks.values()))
    config = LoraConfig(r=first, lora_alpha=first, rank_pattern=ranks, alpha_pattern=ranks, target_modules=list(ranks))
    model = inject_adapter_in_model(config, denoiser())
    set_peft_model_state_dict(model, kept)
    return model.eval()


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("method", CONFIGS)
def test_diffusers_gets_a_stock_lora_of_the_set_rank(method: str, rank: int) -> None:
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3))
    plain = denoiser()(x)
    model = inject_adapter_in_model(CONFIGS[method](), denoiser())
    perturb(model)
    if method.startswith("dylora"):
        set_rank(model, rank)
    with torch.no_grad():
        expected = model.eval()(x)
        assert (expected - plain).abs().max() > 1e-2
        state = get_peft_model_state_dict(model)
        assert all(value.is_contiguous() for value in state.values())  # which saving it asks for
        found = read_as_diffusers_does(state)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_other_models_keep_all_that_is_stored() -> None:
    model = inject_adapter_in_model(CONFIGS["dylora-mixer"](), Block())
    set_rank(model, 2)
    tensors = get_peft_model_state_dict(model)
    assert tensors["to_q.lora_A.weight"].shape == (4, 8)
    assert any(".lora_mixer." in key for key in tensors)
