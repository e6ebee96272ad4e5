"""Moved to `peft_dynamic.hosts.quantization`; the names of before are still here."""

from peft_dynamic.hosts.quantization import is_quantized, keep_training_on_cpu, quantized_layers

__all__ = ["is_quantized", "keep_training_on_cpu", "quantized_layers"]
