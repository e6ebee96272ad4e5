"""DyLoRA: train one LoRA adapter, use it at any rank (Valipour et al., EACL 2023, arXiv 2210.07558)."""

from peft_dynamic._registry import add_peft_type, register

add_peft_type("DYLORA")  # before the config, which names the member

from .config import DyLoRAConfig  # noqa: E402
from .hotswap import hotswap_adapter  # noqa: E402
from .model import DyLoRAModel, at_rank, get_rank, set_rank  # noqa: E402

register("dylora", DyLoRAConfig, DyLoRAModel)

__all__ = ["DyLoRAConfig", "DyLoRAModel", "at_rank", "get_rank", "hotswap_adapter", "set_rank"]
