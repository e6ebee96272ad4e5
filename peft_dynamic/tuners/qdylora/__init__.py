"""QDyLoRA: DyLoRA on a quantised base (Rajabzadeh et al., EMNLP 2024 industry track, arXiv 2402.10462)."""

from peft_dynamic.tuners.qdylora.config import QDyLoRAConfig
from peft_dynamic.tuners.qdylora.model import QDyLoRAModel

__all__ = ["QDyLoRAConfig", "QDyLoRAModel"]
