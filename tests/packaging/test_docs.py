"""Pages and tables that are made from the package are up to date."""

import runpy
from pathlib import Path

from peft_dynamic.engines import ENGINES
from peft_dynamic.methods import METHODS
from tests import engine_support


def test_the_page_of_methods_is_what_the_table_makes(root: Path) -> None:
    script = runpy.run_path(str(root / "docs" / "make_methods.py"))
    assert (root / "docs" / "methods.md").read_text(encoding="utf-8") == script["page"]()


def test_every_method_has_its_page_and_its_line_in_the_readme(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    for method in METHODS.values():
        assert (root / "docs" / method.page).is_file()
        assert f"docs/{method.page}" in readme
        assert f"https://arxiv.org/abs/{method.paper[1]}" in readme


def test_the_page_of_engines_is_what_its_table_makes() -> None:
    assert engine_support.PAGE.read_text(encoding="utf-8") == engine_support.page()


def test_every_engine_names_tests_that_run_as_it_says() -> None:
    assert {row.program.lower() for row in engine_support.ENGINES} >= {*ENGINES}
    for row in engine_support.ENGINES:
        assert bool(row.nodes) == (row.how != engine_support.UNTESTED)
        assert bool(row.package) == (row.how in (engine_support.REAL, engine_support.INSTALLED))
        for node in row.nodes:
            sometimes = any(word in engine_support.decorators(node) for word in ("skipif", "needs_", "model("))
            assert sometimes == (row.how == engine_support.INSTALLED), node


def test_the_figures_are_what_their_script_draws(root: Path) -> None:
    script = runpy.run_path(str(root / "docs" / "make_figures.py"))
    drawn = {f"{name}.svg": draw().svg() for name, draw in script["FIGURES"].items()}
    found = {path.name: path.read_text(encoding="utf-8") for path in (root / "docs" / "figures").iterdir()}
    assert found == drawn
