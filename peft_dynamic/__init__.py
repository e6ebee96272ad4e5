"""peft_dynamic: adapters and trainers for Hugging Face PEFT and TRL. Importing it registers the tuners with PEFT.

Notable: in the process of the `peft-dynamic` command the import waits until a name is used, or a verb asks for it:
`peft-dynamic --help` would wait seconds for torch otherwise. Everywhere else it happens here and now.
"""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"


def _is_the_command() -> bool:
    """Whether this process was started as `peft-dynamic`, or as `python -m peft_dynamic.cli`."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if program == "-m":  # what Python puts there while it looks for the module
        return any(word.removeprefix("-m") == "peft_dynamic.cli" for word in sys.orig_argv)
    return PurePath(program).stem == "peft-dynamic"


if TYPE_CHECKING or not _is_the_command():
    from peft_dynamic._public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("peft_dynamic._public"), name)


__all__ = [  # noqa: F405
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
    "__version__",
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
