"""What pyproject.toml cannot say: packages that are found under another name, and the readme's absolute links.

`trainers/` is top-level here and installed as `peft_dynamic.trainers`. The link peft_dynamic/trainers is left alone:
where git cannot make links it is a file, and elsewhere it may be missing.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def readme() -> str:
    """README.md for the page of a package index, from which a relative link leads nowhere: with links to the tag."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = (ROOT / "peft_dynamic" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.M)[1]

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}{link['text']}({project['urls']['Repository']}/{kind}/v{version}/{link['target']})"

    # neither an address nor a place on this page
    link = re.compile(r"(?P<image>!?)(?P<text>\[[^\]]*\])\((?![a-z]+:|#)(?P<target>[^)\s]+)\)")
    return link.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    packages=[
        *find_packages(include=["peft_dynamic", "peft_dynamic.*"], exclude=["peft_dynamic.trainers*"]),
        *(f"peft_dynamic.{name}" for name in find_packages(include=["trainers", "trainers.*"])),
    ],
    package_dir={"peft_dynamic.trainers": "trainers"},
)
