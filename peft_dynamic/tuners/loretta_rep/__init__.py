"""LoRETTA_rep: LoRA whose two factors are tensor trains (Yang et al., NAACL 2024, arXiv 2402.11417)."""

from peft_dynamic._registry import register

from .config import LorettaRepConfig
from .model import LorettaRepModel

register("loretta_rep", LorettaRepConfig, LorettaRepModel)

__all__ = ["LorettaRepConfig", "LorettaRepModel"]
