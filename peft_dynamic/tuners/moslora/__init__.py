"""MoSLoRA: a trained mixer between the two LoRA factors (Wu et al., EMNLP 2024, arXiv 2406.11909)."""

from peft_dynamic._registry import register

from .config import MoSLoRAConfig
from .model import MoSLoRAModel

register("moslora", MoSLoRAConfig, MoSLoRAModel)

__all__ = ["MoSLoRAConfig", "MoSLoRAModel"]
