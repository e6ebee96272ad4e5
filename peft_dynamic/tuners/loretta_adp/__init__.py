"""LoRETTA_adp: bottleneck adapters whose matrices are tensor trains (Yang et al., NAACL 2024, arXiv 2402.11417)."""

from peft_dynamic._registry import add_peft_type, register

add_peft_type("LORETTA_ADP")  # before the config, which names the member

from .config import LorettaAdpConfig  # noqa: E402
from .layer import LorettaAdpLayer, TensorTrainLinear  # noqa: E402
from .model import LorettaAdpModel  # noqa: E402

register("loretta_adp", LorettaAdpConfig, LorettaAdpModel)

__all__ = ["LorettaAdpConfig", "LorettaAdpLayer", "LorettaAdpModel", "TensorTrainLinear"]
