"""LoRETTA_rep: LoRA whose two factors are tensor trains (Yang et al., NAACL 2024, arXiv 2402.11417)."""

from peft_dynamic.tuners.loretta_rep.config import LorettaRepConfig
from peft_dynamic.tuners.loretta_rep.model import LorettaRepModel

__all__ = ["LorettaRepConfig", "LorettaRepModel"]
