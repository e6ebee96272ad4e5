"""peft_dynamic: adapters and trainers for Hugging Face PEFT and TRL. Importing it registers the tuners with PEFT.

Its names stand in the stub `__init__.pyi`.

Notable: in the process of the `peft-dynamic` command the import waits until a name is used, or a verb asks for it:
`peft-dynamic --help` would wait seconds for torch otherwise. Everywhere else it happens here and now.
"""

import importlib
import sys
from pathlib import Path, PurePath
from typing import Any

from peft_dynamic._names import places

__version__ = "0.1.0.dev0"

_PLACES = places(__file__)
__all__ = ["__version__", *sorted(_PLACES)]  # made from the stub

if not (Path(__file__).parent / "trainers").is_dir():
    # A checkout on Windows, where git writes the link to ../trainers as a file: look for the folder beside us instead.
    __path__.append(str(Path(__file__).parents[1]))


def _is_the_command() -> bool:
    """Whether this process was started as `peft-dynamic`, or as `python -m peft_dynamic.cli`."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if program == "-m":  # what Python puts there while it looks for the module
        return any(word.removeprefix("-m") == "peft_dynamic.cli" for word in sys.orig_argv)
    return PurePath(program).stem == "peft-dynamic"


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


if not _is_the_command():
    globals().update({name: __getattr__(name) for name in _PLACES})
