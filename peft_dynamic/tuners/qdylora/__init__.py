"""QDyLoRA: DyLoRA on a quantised base (Rajabzadeh et al., EMNLP 2024 industry track, arXiv 2402.10462)."""

from peft_dynamic._registry import register

from .config import QDyLoRAConfig
from .model import QDyLoRAModel

register("qdylora", QDyLoRAConfig, QDyLoRAModel)

__all__ = ["QDyLoRAConfig", "QDyLoRAModel"]
