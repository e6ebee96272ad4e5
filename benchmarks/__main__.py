"""Run a study, or go on with it: the cells that have a line in its runs.jsonl are not made again.

python -m benchmarks                                   the studies
python -m benchmarks NAME --data DIR --models DIR      all cells that are missing, and the report
python -m benchmarks NAME --only task=sst2,mrpc        some of them
python -m benchmarks NAME --set lr=0.001,0.002 --tune  other values, on the seed that is kept for choosing them
python -m benchmarks NAME --report                     tables and plots of what there is
python -m benchmarks NAME --tiny                       whether it runs, in seconds, kept nowhere
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import tempfile
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.study import Cell, Context, Lines, Record, Row, Study, load, names

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
BEGIN, END = "<!-- made by --report -->", "<!-- end of what --report made -->"


def parsed() -> tuple[argparse.Namespace, Study]:
    first = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    first.add_argument("study", nargs="?", help="a name; without one, all are listed")
    given, rest = first.parse_known_args()
    if given.study is None:
        if rest:
            first.error(f"name a study before {' '.join(rest)}")
        for name in names():
            print(f"{name:18} {load(name).title}\n{'':18} for {load(name).claim}")
        raise SystemExit
    study = load(given.study)
    parser = argparse.ArgumentParser(f"python -m benchmarks {study.name}", description=study.title)
    for name, meaning in (study.needs | study.optional).items():
        parser.add_argument(f"--{name}", type=Path, help=meaning)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=VALUE", help="the cells that have one of these")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="in place of study.toml's")
    parser.add_argument("--tune", action="store_true", help="the tries on the spare seed")
    parser.add_argument("--tiny", action="store_true", help="a try in seconds")
    parser.add_argument("--report", action="store_true", help="nothing but tables and plots")
    parser.add_argument("--list", action="store_true", help="nothing but the cells that are missing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where results go; default: the study's own folder")
    options = parser.parse_args(rest)
    if set(options.seeds or []) & set(study.tune.get("seeds", [])) and not options.tune:
        parser.error(f"seed {study.tune['seeds'][0]} is the one that settings are chosen on: see --tune")
    missing = [name for name in study.needs if getattr(options, name) is None]
    if missing and not (options.report or options.list):
        parser.error("; ".join(f"pass --{name}: {study.needs[name]}" for name in missing))
    return options, study


def value_of(text: str) -> Any:
    """As TOML reads it, or several with commas between, or a bare word as itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return [value_of(part) for part in text.split(",")] if "," in text else text


def chosen(study: Study, options: argparse.Namespace) -> Study:
    for wanted, name in ((options.tune, "tune"), (options.tiny, "tiny")):
        if wanted:
            if not getattr(study, name):
                raise SystemExit(f"{study.name} has no [{name}] in its study.toml")
            study = study.changed(getattr(study, name))
    for each in options.set:
        key, _, text = each.partition("=")
        study = study.changed({key: value_of(text)})
    return study.changed({"seeds": options.seeds}) if options.seeds else study


def selected(cells: list[Cell], only: list[str]) -> list[Cell]:
    for each in only:
        key, _, text = each.partition("=")
        if not any(key in cell for cell in cells):
            raise SystemExit(f"no cell has {key}: they have {', '.join({name: 0 for cell in cells for name in cell})}")
        cells = [cell for cell in cells if str(cell.get(key)) in text.split(",")]
    return cells


def conditions(context: Context) -> dict[str, Any]:
    installed = {name: importlib.metadata.version(name) for name in PACKAGES if find_spec(name)}
    return {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": context.threads},
        "versions": installed,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def run(cells: list[Cell], context: Context, kept: Lines | Record) -> None:
    import torch

    torch.set_num_threads(context.threads)
    module = importlib.import_module(f"benchmarks.{context.study.name}.run")
    for number, cell in enumerate(cells, 1):
        print(f"{number} of {len(cells)}: {json.dumps(cell)}", flush=True)
        start = time.perf_counter()
        found = module.run(cell, context)
        made = conditions(context) | {"seconds": round(time.perf_counter() - start, 1)}
        if isinstance(kept, Record):
            kept.add(found, cell, made | {"settings": context.settings})
        else:
            kept.add(cell | found | made)


def report(context: Context, kept: Lines | Record) -> None:
    """Print the tables and put them into the study's page; plots and results.json go beside the rows."""
    found: list[Row] | dict[str, Any] = kept.read()
    home = f"benchmarks.{context.study.name}"
    own = (context.study.folder / "report.py").exists()
    make = getattr(importlib.import_module(f"{home}.report" if own else f"{home}.run"), "report", None)
    if not found or make is None:
        print(json.dumps(found, indent=1))
        return
    text = make(found, context)
    print(text)
    page = context.folder / "README.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN) if page.exists() else ("", "", "")
    if begin:
        page.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    options, study = parsed()
    study = chosen(study, options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or (Path(scratch) if options.tiny else study.folder)
        folder.mkdir(parents=True, exist_ok=True)
        given = {name: getattr(options, name) for name in study.needs | study.optional}
        paths = {name: path.resolve() for name, path in given.items() if path is not None}
        context = Context(study, folder.resolve(), paths, options.threads)
        kept = Record(folder / "results.json") if study.keeps == "record" else Lines(folder / "runs.jsonl")
        cells = selected(study.cells(), options.only)
        if isinstance(kept, Lines):
            done = kept.read()
            cells = [cell for cell in cells if not any(study.is_line_of(row, cell) for row in done)]
        if options.list:
            print(*map(json.dumps, cells), sep="\n")
            return
        if not options.report:
            run(cells, context, kept)
        report(context, kept)


if __name__ == "__main__":
    main()
