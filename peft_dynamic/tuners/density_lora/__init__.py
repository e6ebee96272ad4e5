"""LoRA with the activation density loss (Runwal et al., AAAI 2025, arXiv 2402.01911) as part of the adapter."""

from peft_dynamic._registry import add_peft_type, register

add_peft_type("DENSITY_LORA")  # before the config, which names the member

from .config import DensityLoRAConfig  # noqa: E402
from .model import DensityLoRAModel  # noqa: E402

register("density_lora", DensityLoRAConfig, DensityLoRAModel)

__all__ = ["DensityLoRAConfig", "DensityLoRAModel"]
