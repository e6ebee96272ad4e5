"""A study: the cells that its study.toml stands for, and the file in which the finished ones are kept.

study.toml has, each part optional but the first four:

- `title`, `date`, `claim` (what the README or the docs say because of it) and `[needs]` (argument = the folder that it
  names), with `[optional]` for those that can be left out;
- `[grid]`: a cell for each combination of these values; `seeds`: each of them once for each of these;
- `[[runs]]`: what such a block says replaces the grid's values, block by block (seeds as `seed`), for cells that make
  no grid;
- `[lookup.NAME]`: a setting of the cell that depends on others, those named in `by`; a cell for which the table has no
  value is no part of the study, and a list of values makes a cell of each;
- `identity`: the settings that tell finished cells apart (all, if left out); `[absent]`: what a line means that was
  written before a setting was there;
- `[settings]`: all else that run.py reads; `keeps = "record"`: see `Record`;
- `[tune]` and `[tiny]`: values that replace the ones above with --tune (the spare seed) and --tiny (a try in seconds).
"""

import json
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Cell = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What study.toml says."""

    folder: Path
    title: str
    date: str
    claim: str
    needs: dict[str, str] = field(default_factory=dict)
    optional: dict[str, str] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    grid: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    lookup: dict[str, dict[str, Any]] = field(default_factory=dict)
    identity: list[str] = field(default_factory=list)
    absent: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)
    keeps: str = "lines"

    @property
    def name(self) -> str:
        return self.folder.name

    def cells(self) -> list[Cell]:
        """In the order in which they are run: seed by seed, and block by block within one."""
        found: list[Cell] = []
        for block in self.runs or [{}]:
            values = ({"seed": self.seeds} if self.seeds else {}) | self.grid | block
            for each in product(*map(as_list, values.values())):
                found += [cell for cell in self._completed(dict(zip(values, each, strict=True))) if cell not in found]
        return sorted(found, key=lambda cell: cell.get("seed", 0))

    def _completed(self, cell: Cell) -> Iterator[Cell]:
        """With what the lookups say."""
        missing = next((name for name in self.lookup if name not in cell), None)
        if missing is None:
            yield cell
            return
        value: Any = self.lookup[missing]
        for name in self.lookup[missing]["by"]:
            value = value.get(str(cell[name]))
            if value is None:
                return
        for each in as_list(value):
            yield from self._completed(cell | {missing: each})

    def is_line_of(self, row: Row, cell: Cell) -> bool:
        row = self.absent | row
        return all(name in row and row[name] == cell[name] for name in self.identity or cell)

    def lines_of(self, rows: list[Row]) -> list[Row]:
        """The rows that are of a cell of this study, with what older ones lack; not those of tuning and of tries."""
        cells = self.cells()
        return [self.absent | row for row in rows if any(self.is_line_of(row, cell) for cell in cells)]

    def changed(self, values: dict[str, Any]) -> "Study":
        """With other values of the cells' settings, of the seeds and blocks, or of `[settings]`."""
        study, settings = self, deepcopy(self.settings)
        of_cells = {*self.grid, *self.lookup, *(name for block in self.runs for name in block)} - {"seed"}
        for name, value in values.items():
            if name in ("seeds", "runs"):
                study = replace(study, **{name: as_list(value)})
                if name == "seeds":  # also for the blocks that have seeds of their own
                    study = replace(study, runs=[without(block, "seed") for block in study.runs])
            elif name in of_cells:
                study = replace(
                    study,
                    grid=study.grid | {name: value},
                    runs=[without(block, name) for block in study.runs],
                    lookup=without(study.lookup, name),
                )
            elif name in settings:
                merge(settings, {name: value})
            else:
                raise SystemExit(
                    f"{self.name} has no setting {name}: there are {', '.join(sorted({*of_cells, *settings}))}"
                )
        return replace(study, settings=settings)


@dataclass(frozen=True, eq=False)  # hashed as itself, for what a run.py keeps from cell to cell
class Context:
    """What a study's `run` and `report` are given beside the cell or the rows."""

    study: Study
    folder: Path  # where results are written
    paths: dict[str, Path]  # the arguments that the study needs
    threads: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        return self.study.settings


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def without(table: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != name}


def merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Table by table; any other value replaces the one that is there."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def names() -> list[str]:
    return sorted(path.parent.name for path in HERE.glob("*/study.toml"))


def load(name: str) -> Study:
    if name not in names():
        raise SystemExit(f"no study {name!r}: there are {', '.join(names())}")
    folder = HERE / name
    return Study(folder, **tomllib.loads((folder / "study.toml").read_text(encoding="utf-8")))


class Lines:
    """The finished cells: runs.jsonl, one JSON object a line, written as soon as a cell is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Row]:
        """What stands behind the last line end was torn by a stop, unless it is whole."""
        rows: list[Row] = []
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise SystemExit(f"{self.path}, line {number}: {error}") from error
        return rows

    def add(self, row: Row) -> None:
        """On a line of its own: what a stop has torn is removed, and a missing line end is made."""
        if self.path.exists() and (last := self.path.read_bytes().split(b"\n")[-1]):
            try:
                json.loads(last)
                self.path.write_bytes(self.path.read_bytes() + b"\n")
            except ValueError:
                self.path.write_bytes(self.path.read_bytes()[: -len(last)])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Record:
    """What a study of cost keeps: results.json, of which each cell measures a part anew and leaves the others.

    A time is of one machine on one day, so no cell is skipped, and `conditions` says what each was measured under.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def add(self, part: dict[str, Any], cell: Cell, conditions: dict[str, Any]) -> None:
        record = self.read()
        merge(record, part)
        named = ", ".join(f"{key} {value}" for key, value in cell.items()) or "all"
        record.setdefault("conditions", {})[named] = conditions
        self.path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
