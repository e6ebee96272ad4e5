"""Hosts that put a factor away and back: what is shown is made of the stored values, wherever these are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft.tuners.tuners_utils import onload_layer

from tests.conformance.cases import perturb
from tests.tuners.common import rows
from tests.tuners.methods import METHODS, with_method


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows(2)).logits


def put_away(model: Any, how: str, folder: Path) -> None:
    if how == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, folder, execution_device="cpu")


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_an_offloaded_model_computes_the_same(method: str, how: str, rank: int, tmp_path: Path) -> None:
    model = with_method(method)
    perturb(model)
    if hasattr(model, "set_rank"):
        model.set_rank(rank)
    elif rank == 2:
        return
    expected = logits(model)
    put_away(model, how, tmp_path)
    assert any(p.device.type == "meta" for p in model.parameters())
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected)
    text = model.generate(input_ids=rows(2), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert text.shape[1] == rows(2).shape[1] + 3


@pytest.mark.parametrize("method", ["dylora", "dylora-mixer", "dylora-frozen"])
def test_the_rank_can_change_while_the_model_is_offloaded(method: str, tmp_path: Path) -> None:
    model = with_method(method)
    perturb(model)
    expected = {}
    for rank in (1, 2, 8):
        with model.at_rank(rank):
            expected[rank] = logits(model)
    put_away(model, "disk", tmp_path)
    for rank in (8, 1, 2):
        with model.at_rank(rank):
            torch.testing.assert_close(logits(model), expected[rank])


@pytest.mark.parametrize("method", ["dylora", "dylora-mixer", "moslora", "loretta-rep"])
def test_what_peft_reads_of_an_offloaded_layer_is_computed(method: str) -> None:
    """PEFT fetches an offloaded layer to merge it, and reads its factors there: the cut ones, not the stored ones."""
    model = with_method(method)
    perturb(model)
    if hasattr(model, "set_rank"):
        model.set_rank(2)
    name, layer = next((name, m) for name, m in model.named_modules() if hasattr(m, "lora_views"))
    expected = layer.get_delta_weight("default")
    put_away(model, "cpu", Path())
    layer = model.get_submodule(name)
    with onload_layer(layer):
        torch.testing.assert_close(layer.get_delta_weight("default"), expected)
