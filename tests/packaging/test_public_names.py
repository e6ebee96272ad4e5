"""Every public name that there ever was is still importable from where it was."""

import importlib
import json
from pathlib import Path

import pytest

NAMES = json.loads((Path(__file__).parent / "public_names.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_where_it_was(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("module", ["peft_dynamic", "peft_dynamic.trainers"])
def test_the_packages_offer_the_names_of_their_stubs(module: str) -> None:
    package = importlib.import_module(module)
    assert set(package.__all__) >= {*NAMES[module].split()} - {"TYPE_CHECKING"}
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing
