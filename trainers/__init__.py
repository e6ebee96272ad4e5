"""Trainers that go with the adapters, for use with any PEFT adapter or none.

This folder is installed, and imported, as `peft_dynamic.trainers`. Its names stand in the stub `__init__.pyi`. A name
is fetched from its module when it is first asked for, so that a trainer brings in what it needs (TRL, for most) and
nothing for the others.
"""

import importlib
from typing import Any

from peft_dynamic._names import places

if __name__ == "trainers":  # what Python finds from a checkout's root; every class would be made twice
    raise ImportError("trainers is a part of peft_dynamic: import peft_dynamic.trainers in its place.")

_PLACES = places(__file__)
__all__ = sorted(_PLACES)  # made from the stub


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
