"""Moved to `peft_dynamic.hosts.quantization`; the names of before are still here."""

from peft_dynamic.hosts.quantization import is_quantized, quantized_layers
from peft_dynamic.hosts.quantization import unpack_bnb_4bit as keep_training_on_cpu

__all__ = ["is_quantized", "keep_training_on_cpu", "quantized_layers"]
