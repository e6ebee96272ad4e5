"""MoSLoRA: a trained mixer between the two LoRA factors (Wu et al., EMNLP 2024, arXiv 2406.11909)."""

from peft_dynamic.tuners.moslora.config import MoSLoRAConfig
from peft_dynamic.tuners.moslora.model import MoSLoRAModel

__all__ = ["MoSLoRAConfig", "MoSLoRAModel"]
