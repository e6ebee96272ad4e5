"""One wheel for all the tests here, built from a copy of the tree, and small helpers around it."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """The standard output of a command, which must succeed."""
    settings = os.environ | {"PYTHONUTF8": "1"} | env  # whatever the locale
    done = subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build needs, the link kept as a link, to build and to write in."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("peft_dynamic", "trainers"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="session")
def wheel(checkout: Path) -> Path:
    """The wheel, built the long way: tree -> sdist -> wheel."""
    run(sys.executable, "-c", "import setuptools.build_meta as m; m.build_sdist('dist')", cwd=checkout)
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--wheel-dir", "dist", sdist, cwd=checkout)
    (found,) = (checkout / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="session")
def wheel_names(wheel: Path) -> set[str]:
    """The paths of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel in it, its dependencies left to the environment that runs the tests."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target")
    run(*pip, target, wheel, cwd=target)
    return target


@pytest.fixture
def python(installed: Path, tmp_path: Path) -> Callable[[str], str]:
    """Runs code in a fresh process, away from the checkout, with the installed wheel first on the path."""

    def execute(code: str) -> str:
        return run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))

    return execute


@pytest.fixture
def forked(installed: Path, tmp_path: Path) -> Callable[[str], str]:
    """The same in a process that has imported the hosts."""

    def execute(code: str) -> str:
        return processes.python("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}).strip()

    return execute
