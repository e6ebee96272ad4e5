"""The packages: found, not listed. `trainers/` is top-level here and installed as `peft_dynamic.trainers`.

What pyproject.toml cannot say is that the packages of a folder are found under another name. The link
peft_dynamic/trainers is left alone: where git cannot make links it is a file.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["peft_dynamic", "peft_dynamic.*"], exclude=["peft_dynamic.trainers*"]),
        *(f"peft_dynamic.{name}" for name in find_packages(include=["trainers", "trainers.*"])),
    ],
    package_dir={"peft_dynamic.trainers": "trainers"},
)
