"""Pages and tables that are made from the package are up to date."""

import runpy
from pathlib import Path

from peft_dynamic.methods import METHODS


def test_the_page_of_methods_is_what_the_table_makes(root: Path) -> None:
    script = runpy.run_path(str(root / "docs" / "make_methods.py"))
    assert (root / "docs" / "methods.md").read_text(encoding="utf-8") == script["page"]()


def test_every_method_has_its_page_and_its_line_in_the_readme(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    for method in METHODS.values():
        assert (root / "docs" / method.page).is_file()
        assert f"docs/{method.page}" in readme
        assert f"https://arxiv.org/abs/{method.paper[1]}" in readme
