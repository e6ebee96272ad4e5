"""MoSLoRA: a trained mixer between the two LoRA factors (Wu et al., EMNLP 2024, arXiv 2406.11909)."""

from peft_dynamic._registry import add_peft_type, register

add_peft_type("MOSLORA")  # before the config, which names the member

from .config import MoSLoRAConfig  # noqa: E402
from .model import MoSLoRAModel  # noqa: E402

register("moslora", MoSLoRAConfig, MoSLoRAModel)

__all__ = ["MoSLoRAConfig", "MoSLoRAModel"]
