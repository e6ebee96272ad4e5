"""PEFT saves an adapter's configuration last, after its tensors: what is to lie beside them can be made then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

# Called with a configuration of ours that was saved, and its folder. A room above those that save puts itself in here.
after_saving: list[Callable[[Any, Path], None]] = []


def stored_name(name: str) -> str:
    """The name that a module's state dict has for this one: FSDP1 and checkpoint wrappers leave their own part out."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")
