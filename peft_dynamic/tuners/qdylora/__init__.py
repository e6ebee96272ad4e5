"""QDyLoRA: DyLoRA on a quantised base (Rajabzadeh et al., EMNLP 2024 industry track, arXiv 2402.10462)."""

from peft_dynamic._registry import add_peft_type, register

add_peft_type("QDYLORA")  # before the config, which names the member

from .config import QDyLoRAConfig  # noqa: E402
from .model import QDyLoRAModel  # noqa: E402

register("qdylora", QDyLoRAConfig, QDyLoRAModel)

__all__ = ["QDyLoRAConfig", "QDyLoRAModel"]
