"""Facts about torch that we rely on: a release that breaks one turns a test red by name."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from peft_dynamic.hosts.autograd import in_backward, in_reentrant_checkpoint
from peft_dynamic.hosts.modes import eval_mode, evaluating
from peft_dynamic.hosts.offload import is_put_away_by_host
from peft_dynamic.hosts.running import call_frame, is_running


def test_a_call_in_the_backward_pass_is_told_from_one_outside() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append(in_backward()))
    y.sum().backward()
    assert (seen, in_backward()) == ([True], False)


def test_reentrant_checkpointing_is_recognised_and_the_other_kind_is_not() -> None:
    seen = []

    def block(x: torch.Tensor) -> torch.Tensor:
        seen.append(in_reentrant_checkpoint())
        return x * 2

    x = torch.ones(2, requires_grad=True)
    checkpoint(block, x, use_reentrant=True)
    checkpoint(block, x, use_reentrant=False)
    block(x)
    assert seen == [True, False, False]


def test_a_hook_finds_the_call_of_its_module_and_sees_it_end() -> None:
    frames: list[Any] = []
    layer = nn.Linear(2, 2)
    layer.register_forward_pre_hook(lambda module, args: frames.append(call_frame()))
    layer.register_forward_hook(lambda module, args, output: frames.append(is_running(frames[0])))
    layer(torch.ones(1, 2))
    assert frames[1] is True
    assert not is_running(frames[0])


def test_every_optimizer_of_torch_tells_of_its_steps() -> None:
    told: list[str] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: told.append(type(optimizer).__name__))
    try:
        for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad):
            parameter = nn.Parameter(torch.ones(2))
            parameter.grad = torch.ones(2)
            kind([parameter], lr=0.1).step()
    finally:
        handle.remove()
    assert told == ["SGD", "AdamW", "Adagrad"]


def test_a_write_in_place_moves_the_version_and_one_through_data_does_not() -> None:
    parameter = nn.Parameter(torch.ones(2))
    before = parameter._version
    with torch.no_grad():
        parameter.mul_(2)
    assert parameter._version == before + 1
    parameter.data.mul_(2)
    assert parameter._version == before + 1


def test_pruning_registers_the_original_before_it_takes_the_weight_out() -> None:
    events: list[tuple[str, bool]] = []

    class Watched(nn.Linear):
        def register_parameter(self, name: str, param: Any) -> None:
            events.append((name, "weight" in self._parameters))
            super().register_parameter(name, param)

    layer = Watched(2, 2, bias=False)
    events.clear()
    prune.l1_unstructured(layer, "weight", 0.5)
    assert events == [("weight_orig", True)]


def test_a_parametrization_deletes_the_attribute_before_it_changes_the_class() -> None:
    events: list[tuple[str, str]] = []

    class Watched(nn.Linear):
        def __delattr__(self, name: str) -> None:
            events.append((name, type(self).__name__))
            super().__delattr__(name)

    layer = Watched(2, 2)
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    assert events[0] == ("weight", "Watched")
    assert type(layer).__name__ != "Watched"


def test_fsdp1_marks_the_parameters_that_it_has() -> None:
    from torch.distributed.fsdp._common_utils import FSDP_FLATTENED

    assert FSDP_FLATTENED == "_fsdp_flattened"
    layer = nn.Linear(2, 2)
    assert not is_put_away_by_host(layer, layer.weight)
    setattr(layer.weight, FSDP_FLATTENED, True)
    assert is_put_away_by_host(layer, layer.weight)


def test_modes_are_put_back_module_by_module() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[0].eval()
    with evaluating(model):
        assert (model.training, model[1].training, torch.is_grad_enabled()) == (False, False, False)
    with eval_mode(model):
        assert (model[1].training, torch.is_grad_enabled()) == (False, True)
    assert [module.training for module in model.modules()] == [True, False, True]
