"""The public names of a package, written once, in the stub beside it, which type checkers read too."""

from __future__ import annotations

import ast
from pathlib import Path


def places(init: str) -> dict[str, str]:
    """Name -> the module that has it, of each `from module import name as name` in the stub of an `__init__.py`.

    Args:
        init: the `__file__` of the package.
    """
    statements = ast.parse(Path(init).with_suffix(".pyi").read_text(encoding="utf-8")).body
    return {
        alias.name: str(statement.module)
        for statement in statements
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
