"""The arm of any_rank that shrinks what a cut would drop."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

pytest.importorskip("scipy")

from benchmarks.any_rank.run import Steepening, layers


def test_steepening_shrinks_the_tail_alone() -> None:
    """The leading singular values of B A stay, those beyond the drawn rank lose the share; only in the last fifth."""
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"layer": torch.nn.Linear(6, 5, bias=False)})
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))
    (layer,) = layers(model).values()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before = torch.linalg.svdvals(b @ a)[:4].detach()
    steepening = Steepening(model, share=0.3, steps=10, ranks=[2, 4], seed=0)
    for _ in range(9):  # eight are the first four fifths, and of the last two steps the second counts
        steepening()
    torch.testing.assert_close(torch.linalg.svdvals(b @ a)[:4], before)
    steepening()
    after = torch.linalg.svdvals(b @ a)[:4]
    torch.testing.assert_close(after[:2], before[:2])
    torch.testing.assert_close(after[2:], 0.7 * before[2:])
