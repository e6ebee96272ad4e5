"""peft_dynamic: adapters and trainers for Hugging Face PEFT and TRL. Importing it registers the tuners with PEFT."""

from peft_dynamic.tuners.dylora import DyLoRAConfig, DyLoRAModel, get_rank, set_rank
from peft_dynamic.tuners.qdylora import QDyLoRAConfig, QDyLoRAModel

__version__ = "0.1.0.dev0"

__all__ = ["DyLoRAConfig", "DyLoRAModel", "QDyLoRAConfig", "QDyLoRAModel", "__version__", "get_rank", "set_rank"]
