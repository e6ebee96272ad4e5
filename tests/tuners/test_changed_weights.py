"""Factors that change without a sign between two evaluations: what is shown is made of the values that are there."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.conformance.cases import CASES, MAKERS, Case
from tests.conformance.test_conformance import compute
from tests.tuners.common import optimizer_of, rows
from tests.tuners.methods import METHODS, with_method

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")

NAMES = [
    f"{method}-{layers}"
    for method in (*MAKERS, "dylora-paper-mixer")
    for layers in ("linear", "embedding", "convolutions", "experts", "attention", "transposed")
]
CHOSEN = [case for case in CASES if case.name in NAMES]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def by_data_copy(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


def by_a_kept_alias(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for alias, value in zip([parameter.data for parameter in parameters], values, strict=True):
        alias.view(-1)[:] = value.reshape(-1)


def by_new_data(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value.clone()


def by_vector(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    torch.nn.utils.vector_to_parameters(torch.cat([value.reshape(-1) for value in values]), parameters)


def by_numpy(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.detach().numpy()[...] = value.numpy()


def by_set(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.set_(value.clone())


def by_copy(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def by_foreach(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    torch._foreach_copy_([parameter.data for parameter in parameters], values)


def by_swap(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        torch.utils.swap_tensors(parameter, nn.Parameter(value.clone(), requires_grad=True))


WAYS: dict[str, Callable[[list[nn.Parameter], list[torch.Tensor]], None]] = {
    "data.copy_": by_data_copy,
    "alias": by_a_kept_alias,
    "data=": by_new_data,
    "vector_to_parameters": by_vector,
    "numpy": by_numpy,
    "set_": by_set,
    "copy_": by_copy,
    "foreach": by_foreach,
    "swap_tensors": by_swap,
}


def changed(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Other values with the same sum, and in part the same: a change that a checksum would not see."""
    return [value.flip(0) if value.shape[0] > 1 else 2 * value for value in values]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_an_evaluation_sees_every_change(case: Case, way: str) -> None:
    model, inputs = case.perturbed()
    parameters = trained(model)
    before = [parameter.detach().clone() for parameter in parameters]
    after = changed(before)
    fresh, _ = case.perturbed()
    by_copy(trained(fresh), after)
    rank = case.ranks[0]
    for given in (model, fresh):
        if case.ranked:
            given.set_rank(rank)
    first = compute(model, inputs)
    compute(model, inputs)  # now all that is kept is kept
    expected = compute(fresh, inputs)
    assert not torch.allclose(first, expected, atol=1e-4)
    WAYS[way](parameters, after)
    torch.testing.assert_close(compute(model, inputs), expected, rtol=1e-4, atol=case.tolerance)
    WAYS[way](parameters, before)
    torch.testing.assert_close(compute(model, inputs), first, rtol=1e-4, atol=case.tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_the_cycle_of_an_ema(method: str) -> None:
    """Train, swap the averages in, evaluate, swap back, train on: as if nobody had looked."""

    def run(look: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        model = with_method(method)
        if hasattr(model, "set_rank"):
            model.set_rank(2)
        optimizer, parameters = optimizer_of(model), trained(model)
        averages = [parameter.detach().clone() for parameter in parameters]
        seen = []
        for _ in range(6):
            model.train()(input_ids=rows(2), labels=rows(2)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for average, parameter in zip(averages, parameters, strict=True):
                average.lerp_(parameter.detach(), 0.5)
            if look:
                raw = [parameter.data.clone() for parameter in parameters]
                with torch.no_grad():
                    model.eval()(input_ids=rows(2))  # at the raw weights
                    by_data_copy(parameters, averages)
                    seen.append(model(input_ids=rows(2)).logits)
                    twin = copy.deepcopy(model)
                    torch.testing.assert_close(seen[-1], twin(input_ids=rows(2)).logits)
                    by_data_copy(parameters, raw)
        return [parameter.detach() for parameter in parameters], seen

    looked, seen = run(True)
    plain, _ = run(False)
    for one, other in zip(looked, plain, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(seen[0], seen[-1], atol=1e-5)


@pytest.mark.parametrize("method", ["dylora", "dylora-mixer"])
def test_a_training_pass_sees_a_change_too(method: str) -> None:
    model = with_method(method)
    parameters = trained(model)
    generator = torch.Generator().manual_seed(2)
    by_copy(parameters, [0.3 * torch.randn(p.shape, generator=generator) for p in parameters])
    schedule = (
        next(module for module in model.modules() if hasattr(module, "lora_views")).lora_views["default"].schedule
    )
    schedule.refresh()
    schedule.drawn = 2
    model.train()(input_ids=rows(2), labels=rows(2)).loss.backward()
    by_data_copy(parameters, changed([parameter.detach().clone() for parameter in parameters]))
    found = model(input_ids=rows(2)).logits.detach()
    twin = copy.deepcopy(model)
    twin_schedule = next(m for m in twin.modules() if hasattr(m, "lora_views")).lora_views["default"].schedule
    twin_schedule.refresh()
    twin_schedule.drawn = 2
    torch.testing.assert_close(found, twin(input_ids=rows(2)).logits.detach())


def at_rank_two(method: str) -> tuple[Any, list[torch.Tensor]]:
    """A model with random weights, at rank 2 where it has ranks, and what of it is trained."""
    model = with_method(method).eval()
    if hasattr(model, "set_rank"):
        model.set_rank(2)
    parameters = trained(model)
    generator = torch.Generator().manual_seed(2)
    by_copy(parameters, [0.3 * torch.randn(p.shape, generator=generator) for p in parameters])
    return model, parameters


@pytest.mark.parametrize("method", METHODS)
def test_what_is_merged_and_exported_is_what_is_there(method: str) -> None:
    model, parameters = at_rank_two(method)
    with torch.no_grad():
        model(input_ids=rows(2))
        by_new_data(parameters, changed([parameter.detach().clone() for parameter in parameters]))
        expected: Any = copy.deepcopy(model)(input_ids=rows(2)).logits
        if method == "loretta-adp":  # which does not merge
            torch.testing.assert_close(model(input_ids=rows(2)).logits, expected)
            return
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=rows(2)).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["data.copy_", "data=", "numpy"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "density-lora"])
def test_a_change_between_two_tokens_of_a_decoding(method: str, way: str) -> None:
    """Weights that are swapped as a whole are seen at the next token, and a single row within eight."""
    model, parameters = at_rank_two(method)
    token = rows(2)[:, :1]
    with torch.no_grad():
        model(input_ids=token)
        model(input_ids=token)
        WAYS[way](parameters, [2 * p.detach() + 0.1 for p in parameters])
        torch.testing.assert_close(model(input_ids=token).logits, copy.deepcopy(model)(input_ids=token).logits)
        for parameter in parameters:
            parameter.data[-1] += 0.5
        for _ in range(8):
            found = model(input_ids=token).logits
        torch.testing.assert_close(found, copy.deepcopy(model)(input_ids=token).logits)
