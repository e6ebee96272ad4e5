"""What a verb wrote, or would write: files, ranks, numbers and bytes, for the terminal and for --json."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import typer

from peft_dynamic.rules import check_apart, check_target


def check_place(out: Path, *read: str | Path) -> Path:
    """The folder to write, with links followed.

    Args:
        out: what the user named.
        *read: the adapters that the result is made of, which it must not replace.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError: nothing can be written there.
    """
    target = check_target(out, "out")
    check_apart(read, out)
    return target


@contextmanager
def place(out: Path, dry_run: bool, *read: str | Path) -> Iterator[Path]:
    """The folder to write to: `out`, or in a dry run one that goes away.

    Args:
        out: as in `check_place`, whose checks a dry run makes too.
        dry_run: whether nothing is to be left.
        *read: as in `check_place`.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError: nothing can be written there.
    """
    target = check_place(out, *read)
    if not dry_run:
        yield out
        return
    with tempfile.TemporaryDirectory() as work:
        yield Path(work, target.name)


def described(folder: Path) -> dict[str, Any]:
    """Of a folder with an adapter or a model: its files in bytes, and the tensors in its safetensors.

    Returns:
        files, bytes (of all files), parameters (numbers in all tensors), and of an adapter the ranks of its modules.
    """
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*"))}
    files = {name: size for name, size in files.items() if (folder / name).is_file()}
    shapes: dict[str, list[int]] = {}
    for name in files:
        if name.endswith(".safetensors"):
            shapes |= shapes_in(folder / name)
    ranks = _ranks(folder) if (folder / "adapter_config.json").is_file() else {}
    about = {"files": files, "bytes": sum(files.values()), "parameters": sum(map(prod, shapes.values()))}
    return {**about, "ranks": ranks} if ranks else about


def shapes_in(path: Path) -> dict[str, list[int]]:
    """Tensor -> its shape, by the header of a safetensors file.

    Raises:
        ValueError, KeyError, TypeError: the file is damaged.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= path.stat().st_size - 8:
            raise ValueError(f"its header has {size} bytes, and the file {path.stat().st_size}")
        header = json.loads(file.read(size))
    return {name: about["shape"] for name, about in header.items() if name != "__metadata__"}


def _ranks(folder: Path) -> dict[str, int]:
    """Module -> its rank."""
    from peft_dynamic.algebra.checkpoint import read_checkpoint
    from peft_dynamic.export import PEFT_PREFIX

    read = read_checkpoint(folder)
    return {module.removeprefix(PEFT_PREFIX): product.rank for module, product in read.products.items()}


def tell(about: dict[str, Any], out: object) -> None:
    """Print what would be written."""
    files = ", ".join(f"{name} ({size:,} bytes)" for name, size in about["files"].items())
    typer.echo(f"Nothing is written. {out} would have {about['parameters']:,} numbers: {files}.")
    for module, rank in about.get("ranks", {}).items():
        typer.echo(f"  rank {rank}  {module}")
