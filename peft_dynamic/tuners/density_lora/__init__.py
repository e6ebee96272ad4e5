"""LoRA with the activation density loss (Runwal et al., AAAI 2025, arXiv 2402.01911) as part of the adapter."""

from peft_dynamic.tuners.density_lora.config import DensityLoRAConfig
from peft_dynamic.tuners.density_lora.model import DensityLoRAModel

__all__ = ["DensityLoRAConfig", "DensityLoRAModel"]
