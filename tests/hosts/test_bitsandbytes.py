"""Facts about bitsandbytes that we rely on: a rename would cost a training its gradients, without an error."""

import inspect

import bitsandbytes as bnb
import torch

from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.hosts.quantization import is_quantized, quantized_layers, unpack_bnb_4bit


def four_bit() -> torch.nn.Module:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
    return layer.to("cpu")


def test_the_attributes_that_switch_its_packing_off_are_there() -> None:
    assert hasattr(bnb.nn.Linear4bit(8, 8), "support_avx512bf16_for_cpu")
    assert callable(bnb.functional._convert_weight_packed_for_cpu_inverse)
    assert "quant_state.packing_format_for_cpu = True" in inspect.getsource(bnb.functional)


def test_a_quantised_layer_is_recognised_and_trains_after_an_evaluation() -> None:
    layer = four_bit()
    assert is_quantized(layer)
    assert quantized_layers(torch.nn.Sequential(layer, torch.nn.Linear(2, 2))) == ["0"]
    unpack_bnb_4bit(torch.nn.Sequential(layer))
    x = torch.ones(1, 64, requires_grad=True)
    with torch.no_grad():
        layer.eval()(x)
    layer.train()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_our_evaluations_leave_a_quantised_layer_trainable() -> None:
    """Of a model that no part of ours has prepared, such as a stock LoRA over 4 bits."""
    layer = four_bit()
    layer.support_avx512bf16_for_cpu = True  # what bitsandbytes finds out of the CPU
    x = torch.ones(1, 64, requires_grad=True)
    with evaluating(torch.nn.Sequential(layer)):
        assert not layer.support_avx512bf16_for_cpu
        layer(x)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
