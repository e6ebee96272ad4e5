"""LoRETTA_rep: LoRA whose two factors are tensor trains (Yang et al., NAACL 2024, arXiv 2402.11417)."""

from peft_dynamic._registry import add_peft_type, register

add_peft_type("LORETTA_REP")  # before the config, which names the member

from .config import LorettaRepConfig  # noqa: E402
from .model import LorettaRepModel  # noqa: E402

register("loretta_rep", LorettaRepConfig, LorettaRepModel)

__all__ = ["LorettaRepConfig", "LorettaRepModel"]
