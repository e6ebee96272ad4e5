"""Rows out of what people have: JSON, CSV, Parquet, Arrow, a saved dataset, or one of the Hub.

Notable: JSON and CSV go through Python's own readers and all else through `datasets`. Its JSON reader makes dates of
texts that look like dates, and its CSV reader numbers of digits and nothing of "NA"; here a text stays what it is.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from peft_dynamic._extras import how_to_install
from peft_dynamic.cli._edge import blame, debugging, reason, require_package

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PACKED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
KINDS = "JSON (lines or a list), CSV, TSV, Parquet or Arrow; the text formats also as .gz, .bz2 or .xz"
EXAMPLE_LINE = '{"prompt": "...", "completion": "..."}'


def read_rows(source: str, option: str) -> list[dict[str, Any]]:
    """The rows of a file, of a folder that `Dataset.save_to_disk` wrote, or of a Hub dataset.

    Of several splits --eval-data takes "validation", else "test"; all else takes "train".

    Raises:
        typer.BadParameter: it is missing, empty, damaged or not made of rows.
        UserError: it needs the package `datasets`, which is not installed.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = _read_file(path, option)
    elif path.is_dir():
        rows = _read_saved(path, option)
    elif path.suffix or path.exists() or not HUB_NAME.fullmatch(source):
        raise typer.BadParameter(
            f"{source!r} is not a file. Pass a file of JSON lines, or a Hub dataset as user/name.", param_hint=option
        )
    else:
        rows = _read_hub(source, option)
    if not rows:
        raise typer.BadParameter(f"{source!r} has no rows; it needs at least one.", param_hint=option)
    return rows


def _read_file(path: Path, option: str) -> list[dict[str, Any]]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in BUILDERS:
        return _read_with_datasets(BUILDERS[suffixes[-1]], path)
    unpack = PACKED.get(suffixes[-1]) if suffixes else None
    if unpack:
        suffixes.pop()
    try:
        data = path.read_bytes()
        text = (unpack(data) if unpack else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"{path}: not UTF-8 text ({error.reason}). Files may be {KINDS}, named so.", param_hint=option
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {reason(error)}.", param_hint=option) from error
    if suffixes and suffixes[-1] in DELIMITERS:
        return _read_csv(path, text, DELIMITERS[suffixes[-1]], option)
    return _read_json(path, text, option)


def _read_json(path: Path, text: str, option: str) -> list[dict[str, Any]]:
    """JSON lines, blank ones left out, or one list. Only a line feed ends a line: U+2028 may stand inside a string."""
    if text.lstrip().startswith("["):
        try:
            numbered = list(enumerate(json.loads(text), start=1))
        except (ValueError, RecursionError):
            pass  # lines after all, or damaged; told below
        else:
            return [_row(row, f"{path}, row {number}: each entry", option) for number, row in numbered]
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                why = error.msg if isinstance(error, json.JSONDecodeError) else reason(error)
                raise typer.BadParameter(
                    f"{path}, line {number}: not JSON ({why}). The file must hold one JSON object a line (JSON lines), "
                    "or one list of objects.",
                    param_hint=option,
                ) from error
            rows.append(_row(row, f"{path}, line {number}: each line", option))
    return rows


def _row(row: Any, what: str, option: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise typer.BadParameter(
            f"{what} must be one JSON object, such as {EXAMPLE_LINE}; got {json.dumps(row)[:60]!r}.", param_hint=option
        )
    return row


def _read_csv(path: Path, text: str, delimiter: str, option: str) -> list[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a text may be longer than Python's 128 KiB
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = list(lines)
    except csv.Error as error:
        raise typer.BadParameter(f"{path}, line {lines.line_num}: {error}.", param_hint=option) from error
    names = lines.fieldnames or []
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"{path}: two columns have the same name; the first line says {names}.")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise typer.BadParameter(
                f"{path}, row {number}: it has more or fewer fields than the first line, {names}. A field with a "
                f"{'tab' if delimiter != ',' else 'comma'}, a quote or a line break in it has to be quoted.",
                param_hint=option,
            )
    return rows


def _read_with_datasets(builder: str, path: Path) -> list[dict[str, Any]]:
    require_package("datasets", f"a file of {builder.capitalize()}", "demo")
    from datasets import load_dataset

    # its cache goes elsewhere: the rows are kept in memory
    with (
        blame(str(path), f"Pass a {builder.capitalize()} file that is whole, or JSON lines."),
        _quiet_datasets(),
        tempfile.TemporaryDirectory() as cache,
    ):
        return list(load_dataset(builder, data_files=str(path), split="train", cache_dir=cache))


def _read_saved(path: Path, option: str) -> list[dict[str, Any]]:
    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        raise typer.BadParameter(
            f"{path} is a folder, but none that Dataset.save_to_disk wrote. Pass that, or a file: {KINDS}.",
            param_hint=option,
        )
    require_package("datasets", "a saved dataset", "demo")
    from datasets import load_from_disk

    with blame(str(path), "Save it again with Dataset.save_to_disk, or pass a file."), _quiet_datasets():
        loaded = load_from_disk(str(path))
        return list(_split_of(loaded, str(path), option))


def _read_hub(name: str, option: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise typer.BadParameter(
            f"{name!r} is no file here, and a Hub dataset needs datasets. {how_to_install('demo', 'datasets')}",
            param_hint=option,
        ) from error
    try:
        with _quiet_datasets():
            if option != "--eval-data":
                return list(load_dataset(name, split="train"))
            return list(_split_of(load_dataset(name), name, option))
    except typer.BadParameter:
        raise
    except Exception as error:  # whatever is wrong, the user has to know the name and the reason
        raise typer.BadParameter(
            f"{name!r} is no file here, and as a Hub dataset it could not be loaded: {reason(error)}",
            param_hint=option,
        ) from error


def _split_of(loaded: Any, source: str, option: str) -> Any:
    """The split to use, of a dataset or of a dict of splits."""
    if not isinstance(loaded, dict):
        return loaded
    wanted = ("validation", "test", "train") if option == "--eval-data" else ("train",)
    for name in wanted:
        if name in loaded:
            return loaded[name]
    raise typer.BadParameter(
        f"{source} has the splits {', '.join(map(repr, loaded))}, and none is named {' or '.join(map(repr, wanted))}.",
        param_hint=option,
    )


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without its bars, and without its own account of an error that we tell."""
    import datasets

    if debugging():
        yield
        return
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
