"""What `peft_dynamic` offers by name. Importing this registers all methods with PEFT."""

from peft_dynamic.density import (
    ActivationDensityLoss,
    DensityReport,
    calibrate_cut,
    cut_activations,
    measure_density,
    sparse_inference,
)
from peft_dynamic.export import export_lora
from peft_dynamic.hub import push_adapter
from peft_dynamic.ranks import RankCurve, rank_curve
from peft_dynamic.tuners.density_lora import DensityLoRAConfig, DensityLoRAModel
from peft_dynamic.tuners.dylora import DyLoRAConfig, DyLoRAModel, at_rank, get_rank, hotswap_adapter, set_rank
from peft_dynamic.tuners.loretta_adp import LorettaAdpConfig, LorettaAdpModel
from peft_dynamic.tuners.loretta_rep import LorettaRepConfig, LorettaRepModel
from peft_dynamic.tuners.moslora import MoSLoRAConfig, MoSLoRAModel
from peft_dynamic.tuners.qdylora import QDyLoRAConfig, QDyLoRAModel

__all__ = [
    "ActivationDensityLoss",
    "DensityLoRAConfig",
    "DensityLoRAModel",
    "DensityReport",
    "DyLoRAConfig",
    "DyLoRAModel",
    "LorettaAdpConfig",
    "LorettaAdpModel",
    "LorettaRepConfig",
    "LorettaRepModel",
    "MoSLoRAConfig",
    "MoSLoRAModel",
    "QDyLoRAConfig",
    "QDyLoRAModel",
    "RankCurve",
    "at_rank",
    "calibrate_cut",
    "cut_activations",
    "export_lora",
    "get_rank",
    "hotswap_adapter",
    "measure_density",
    "push_adapter",
    "rank_curve",
    "set_rank",
    "sparse_inference",
]
