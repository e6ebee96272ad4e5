"""LoRETTA_adp: bottleneck adapters whose matrices are tensor trains (Yang et al., NAACL 2024, arXiv 2402.11417)."""

from peft_dynamic.tuners.loretta_adp.config import LorettaAdpConfig
from peft_dynamic.tuners.loretta_adp.layer import LorettaAdpLayer
from peft_dynamic.tuners.loretta_adp.model import LorettaAdpModel
from peft_dynamic.tuners.tensor_train import TensorTrainLinear

__all__ = ["LorettaAdpConfig", "LorettaAdpLayer", "LorettaAdpModel", "TensorTrainLinear"]
