"""What is built is what is in the tree, under the names and the version that we promise."""

import email
import re
import shutil
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_dynamic import __version__
from tests.packaging.conftest import run
from tests.processes import python

NOT_SHIPPED = {".pyc"}


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def tree_files(root: Path) -> set[str]:
    """The files that a wheel should have: all under peft_dynamic/ (the link aside) and trainers/ under its new name."""
    places = {"peft_dynamic": root / "peft_dynamic", "peft_dynamic/trainers": root / "trainers"}
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in places.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in NOT_SHIPPED and (root / "peft_dynamic/trainers") not in path.parents
    }


def test_the_wheel_has_the_files_of_the_tree_and_no_others(root: Path, wheel_names: set[str]) -> None:
    shipped = {name for name in wheel_names if ".dist-info/" not in name}
    expected = tree_files(root)
    assert shipped == expected, (
        f"only in the tree: {sorted(expected - shipped)}, only in the wheel: {sorted(shipped - expected)}; "
        "a data file is one pattern in package-data"
    )


def test_the_link_to_the_trainers_is_relative(root: Path) -> None:
    assert (root / "peft_dynamic/trainers").readlink() == Path("../trainers")


def test_the_sdist_has_the_sources_once(checkout: Path, wheel: Path) -> None:
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert "trainers/__init__.py" in names
    assert not {name for name in names if name.startswith("peft_dynamic/trainers")}


def test_the_metadata(wheel: Path, wheel_names: set[str]) -> None:
    info = f"peft_dynamic-{__version__}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt", "peft_dynamic/py.typed"} <= wheel_names
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Name"] == "peft-dynamic"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "peft-dynamic = peft_dynamic.cli:main" in entry_points


LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")


def test_the_readme_of_the_index_has_links_to_the_tag(root: Path, project: dict, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"peft_dynamic-{__version__}.dist-info/METADATA"))
    readme = (root / "README.md").read_text(encoding="utf-8")
    shown = metadata.get_payload(decode=True).decode("utf-8")
    assert shown.count("\n") >= readme.count("\n")
    repository = project["project"]["urls"]["Repository"]
    assert metadata.get_all("Project-URL") == [f"Repository, {repository}"]
    for (image, own), (_, target) in zip(LINK.findall(readme), LINK.findall(shown), strict=True):
        if own.startswith(("https://", "#")):
            assert target == own
        else:
            assert (root / own.partition("#")[0]).exists()
            assert target == f"{repository}/{'raw' if image else 'blob'}/v{__version__}/{own}"


def test_an_index_takes_what_is_built(wheel: Path) -> None:
    built = [*wheel.parent.glob("*.whl"), *wheel.parent.glob("*.tar.gz")]
    assert len(built) == 2
    out = run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=wheel.parent, COLUMNS="200")
    assert out.count("PASSED") == 2


@pytest.mark.parametrize("link", ["a file", "missing"])
def test_a_wheel_that_is_built_without_the_link_is_whole(
    checkout: Path, wheel_names: set[str], tmp_path: Path, link: str
) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(checkout, tree, symlinks=True, ignore=shutil.ignore_patterns("dist", "build", "*.egg-info"))
    (tree / "peft_dynamic" / "trainers").unlink()
    if link == "a file":
        (tree / "peft_dynamic" / "trainers").write_text("../trainers")
    run(sys.executable, "-c", "import setuptools.build_meta as m; m.build_wheel('../dist')", cwd=tree)
    (made,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        assert {name for name in archive.namelist() if not name.endswith("/")} == wheel_names


def test_the_installed_wheel_is_whole(forked: Callable[[str], str], installed: Path) -> None:
    code = """
import importlib.metadata, peft_dynamic.trainers
print(importlib.metadata.version("peft-dynamic"), peft_dynamic.__version__, peft_dynamic.trainers.__file__)
"""
    in_metadata, in_package, trainers = forked(code).split(maxsplit=2)
    assert in_metadata == in_package == __version__
    assert Path(trainers).is_relative_to(installed)
    top_level = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert top_level - {"bin"} == {"peft_dynamic"}


def test_a_bare_import_of_trainers_says_what_to_import(checkout: Path) -> None:
    code = """
try:
    import trainers.soft.config
except ImportError as error:
    print(error)
"""
    out = python("-c", code, cwd=checkout)
    assert "import peft_dynamic.trainers in its place" in out


def test_a_checkout_works_where_git_cannot_make_links(checkout: Path, tmp_path: Path) -> None:
    shutil.copytree(checkout / "peft_dynamic", tmp_path / "peft_dynamic", symlinks=True)
    shutil.copytree(checkout / "trainers", tmp_path / "trainers")
    link = tmp_path / "peft_dynamic" / "trainers"
    link.unlink()
    link.write_text("../trainers")  # as git writes it with core.symlinks=false
    code = "import peft_dynamic.trainers.rewards.nlu as nlu; print(nlu.__name__, nlu.__file__)"
    name, file = python("-c", code, cwd=tmp_path).split()
    assert name == "peft_dynamic.trainers.rewards.nlu"
    assert Path(file) == tmp_path / "trainers" / "rewards" / "nlu.py"
