"""Facts about accelerate that we rely on: a release that breaks one turns a test red by name."""

from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from peft_dynamic.hosts.offload import is_put_away_by_host, real


def test_a_module_keeps_its_forward_before_a_hook_puts_its_weights_away() -> None:
    seen: list[bool] = []

    class Hook(AlignDevicesHook):
        def init_hook(self, module: nn.Module) -> nn.Module:
            seen.append(is_put_away_by_host(module, module.weight))
            return super().init_hook(module)

    layer = nn.Linear(2, 2)
    add_hook_to_module(layer, Hook(execution_device="cpu", offload=True))
    assert seen == [True]
    assert is_put_away_by_host(layer, layer.weight)
    remove_hook_from_module(layer)
    assert not is_put_away_by_host(layer, layer.weight)


def test_a_hook_that_puts_nothing_away_is_told_from_one_that_does() -> None:
    layer = nn.Linear(2, 2)
    add_hook_to_module(layer, AlignDevicesHook(io_same_device=True))
    assert not is_put_away_by_host(layer, layer.weight)


def test_what_is_offloaded_is_found_in_the_hook_and_is_there_in_the_forward_pass() -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(2, 2)
    weight = layer.weight.detach().clone()
    cpu_offload(layer, execution_device="cpu")
    assert layer.weight.device.type == "meta"
    assert torch.equal(real(layer, "weight", layer.weight), weight)
    devices: list[str] = []
    forward, layer._old_forward = layer._old_forward, lambda x: devices.append(layer.weight.device.type) or forward(x)
    layer(torch.ones(1, 2))
    assert devices == ["cpu"]
    assert layer.weight.device.type == "meta"
