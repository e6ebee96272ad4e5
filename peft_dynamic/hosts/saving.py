"""PEFT saves an adapter's configuration last, after its tensors: what is to lie beside them can be made then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

# Called with a configuration of ours that was saved, and its folder. A room above those that save puts itself in here.
after_saving: list[Callable[[Any, Path], None]] = []
