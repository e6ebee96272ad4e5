"""LoRETTA_adp: bottleneck adapters whose matrices are tensor trains (Yang et al., NAACL 2024, arXiv 2402.11417)."""

from peft_dynamic._registry import register

from .config import LorettaAdpConfig
from .layer import LorettaAdpLayer, TensorTrainLinear
from .model import LorettaAdpModel

register("loretta_adp", LorettaAdpConfig, LorettaAdpModel)

__all__ = ["LorettaAdpConfig", "LorettaAdpLayer", "LorettaAdpModel", "TensorTrainLinear"]
