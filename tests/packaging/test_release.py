"""Whether a tree can be released is said by .ci/release_check.py."""

import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

FILES = ("pyproject.toml", "CHANGELOG.md", "CITATION.cff", "peft_dynamic/__init__.py")


@pytest.fixture(scope="module")
def problems(root: Path) -> Callable[[Path, str], list[str]]:
    return runpy.run_path(str(root / ".ci" / "release_check.py"))["problems"]


@pytest.fixture
def tree(root: Path, tmp_path: Path) -> Path:
    """What the script reads, as it is on the day of a release."""
    for file in FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(root / file, tmp_path / file)
    change(tmp_path / "pyproject.toml", "/OWNER/", "/somebody/")
    change(tmp_path / "peft_dynamic/__init__.py", r'__version__ = ".+"', '__version__ = "1.2.3"')
    change(tmp_path / "CHANGELOG.md", r"## \[Unreleased\]", "## [1.2.3] - 2030-01-31")
    change(tmp_path / "CITATION.cff", r"(?m)^version: .+", "version: 1.2.3\ndate-released: 2030-01-31")
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text, found = re.subn(old, new, path.read_text(encoding="utf-8"))
    assert found
    path.write_text(text, encoding="utf-8")


def test_a_tree_that_is_ready(problems: Callable[[Path, str], list[str]], tree: Path) -> None:
    assert problems(tree, "v1.2.3") == []


@pytest.mark.parametrize("tag", ["", "1.2.3", "v1.2.4"])
def test_a_tag_that_is_not_the_version(problems: Callable[[Path, str], list[str]], tree: Path, tag: str) -> None:
    (problem,) = problems(tree, tag)
    assert "__version__ in peft_dynamic/__init__.py is 1.2.3" in problem


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("CHANGELOG.md", "## .1.2.3. - 2030-01-31", "## [Unreleased]", "no heading"),
        ("CITATION.cff", "version: 1.2.3", "version: 1.2.2", "another version"),
        ("CITATION.cff", "date-released: .*", "date-released: 2030-02-01", "another date-released"),
        ("pyproject.toml", "/somebody/", "/OWNER/", "OWNER is to be filled in"),
    ],
)
def test_what_was_forgotten(
    problems: Callable[[Path, str], list[str]], tree: Path, file: str, old: str, new: str, said: str
) -> None:
    change(tree / file, old, new)
    (problem,) = problems(tree, "v1.2.3")
    assert said in problem


def test_a_development_version_is_no_release(problems: Callable[[Path, str], list[str]], tree: Path) -> None:
    for file in FILES[1:]:
        change(tree / file, r"1\.2\.3", "1.2.3.dev0")
    (problem,) = problems(tree, "v1.2.3.dev0")
    assert "is no release" in problem


def test_the_citation_has_the_version_of_the_package(root: Path) -> None:
    from peft_dynamic import __version__

    assert f"\nversion: {__version__}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
