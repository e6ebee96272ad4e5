"""LoRA with the activation density loss (Runwal et al., AAAI 2025, arXiv 2402.01911) as part of the adapter."""

from peft_dynamic._registry import register

from .config import DensityLoRAConfig
from .model import DensityLoRAModel

register("density_lora", DensityLoRAConfig, DensityLoRAModel)

__all__ = ["DensityLoRAConfig", "DensityLoRAModel"]
