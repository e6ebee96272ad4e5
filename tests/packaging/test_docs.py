"""Pages and tables that are made from the package are up to date."""

import re
import runpy
from pathlib import Path

import pytest

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


# Two numbers with nothing but a comma, a semicolon or " / " between, and no word behind the second.
NUMBER = r"[-+]?[\d.,]*\d(?:e-?\d+)?(?: ?%|x)?"
LISTED = re.compile(rf"(?<![\w.-]){NUMBER}(?:[,;]| /) {NUMBER}(?= *(?:[,;/)]|$))")


def cells(line: str) -> list[str]:
    """Of a table's row, without code."""
    return [cell.strip() for cell in re.sub(r"`[^`]*`", "", line).strip("|").split("|")]


@pytest.mark.parametrize(
    ("cell", "listed"),
    [
        ("23.0, 26.6, 25.4", True),
        ("49.1 %, 41.1 %", True),
        ("62 / 239", True),
        ("-0.6 (+2.1, -1.1, -2.6)", True),
        ("73,728, 74,498", True),
        ("73,728", False),
        ("83.6 ± 0.4", False),
        ("-0.6 (-1.4 to +0.3)", False),
        ("hidden 64, 4 layers, vocabulary 49152", False),
        ("ranks 1, 4 and 8", False),
        ("LoRA for 4/5, cores for 1/5", False),
    ],
)
def test_the_lint_sees_a_cell_that_lists_numbers(cell: str, listed: bool) -> None:
    assert bool(LISTED.search(cell)) == listed


def test_no_cell_of_a_table_lists_numbers(root: Path) -> None:
    """Each figure has a cell of its own, with its spread or its interval."""
    pages = [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("benchmarks/**/*.md")]
    found = [
        f"{page.relative_to(root)}:{number}: {cell}"
        for page in pages
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if line.startswith("|")
        for cell in cells(line)
        if LISTED.search(cell)
    ]
    assert not found
