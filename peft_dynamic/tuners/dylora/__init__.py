"""DyLoRA: train one LoRA adapter, use it at any rank (Valipour et al., EACL 2023, arXiv 2210.07558)."""

from peft_dynamic.tuners.dylora import rows as rows  # for the argument `ranks` of PeftModel
from peft_dynamic.tuners.dylora.budget import budget_ranks
from peft_dynamic.tuners.dylora.config import DyLoRAConfig
from peft_dynamic.tuners.dylora.hotswap import hotswap_adapter
from peft_dynamic.tuners.dylora.model import DyLoRAModel, at_rank, calibrate, drawn_rank, get_rank, set_rank

__all__ = [
    "DyLoRAConfig",
    "DyLoRAModel",
    "at_rank",
    "budget_ranks",
    "calibrate",
    "drawn_rank",
    "get_rank",
    "hotswap_adapter",
    "set_rank",
]
