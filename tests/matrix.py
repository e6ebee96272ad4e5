"""`make test-matrix`: the suite on other kernels, threads, terminals, locales, folders and orders, and fresh examples.

Nothing here may change a test's result, so every row must be as green as `make test`. It takes an hour on two cores.
Names of rows as arguments run those alone: `make test-matrix ARGS="avx2 nothing-set"`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# All property tests carry the mark of hypothesis.
FRESH = ("-m", "hypothesis", "--hypothesis-profile=fresh", "--timeout=3000")


class Row(NamedTuple):
    """One way to run the suite."""

    env: Mapping[str, str] = MappingProxyType({})
    arguments: Sequence[str] = ("-n", "2")
    only_env: bool = False  # nothing but `env` is set
    leftovers: bool = False  # from a folder with what other runs left


ROWS = {
    "default-kernels": Row({"ATEN_CPU_CAPABILITY": "default"}),
    "avx2": Row({"ATEN_CPU_CAPABILITY": "avx2"}),
    "onednn-avx2": Row({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "default-kernels-one-thread": Row({"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}),
    "two-threads": Row({"OMP_NUM_THREADS": "2"}, ()),
    "narrow": Row({"COLUMNS": "40"}),
    "lang-c": Row({"LANG": "C"}),
    "ascii": Row({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "coloured": Row({"FORCE_COLOR": "1", "TERM": "xterm-256color"}),
    "leftovers": Row(leftovers=True),
    "nothing-set": Row(only_env=True),
    "in-order": Row(arguments=("-n", "2", "-p", "no:randomly", "-o", "addopts=--import-mode=importlib")),
    "fresh-examples": Row(arguments=("-n", "2", *FRESH)),
}


def leave_things(folder: Path) -> None:
    """What the commands, the examples and hypothesis leave in the folder they run in."""
    for name in ("peft-dynamic-out/adapter", "out", "runs", "lora", "adapter", "checkpoint-5", "build", "dist"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text("{}", encoding="utf-8")
    for name in ("peft_dynamic.py", "trainers.py", "datasets.py", "curve.json", "run.yaml"):
        (folder / "peft-dynamic-out" / name).write_text("", encoding="utf-8")


def run(name: str) -> bool:
    """Run one row; its output goes to the terminal only when it fails."""
    row = ROWS[name]
    kept = {} if row.only_env else dict(os.environ)
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    with tempfile.TemporaryDirectory() as folder:
        if row.leftovers:
            leave_things(Path(folder))
        began = time.monotonic()
        done = subprocess.run(
            [*command, *row.arguments, str(ROOT / "tests")],
            cwd=folder if row.leftovers else ROOT,
            env={**kept, **row.env},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    lines = done.stdout.strip().splitlines()
    print(f"{name:28} {time.monotonic() - began:6.0f} s  {lines[-1] if lines else 'no output'}", flush=True)
    if done.returncode:
        print(done.stdout[-20_000:], done.stderr[-5_000:], flush=True)
    return done.returncode == 0


def main() -> int:
    """Run the rows that were named, or all."""
    names = sys.argv[1:] or list(ROWS)
    if unknown := sorted(set(names) - set(ROWS)):
        print(f"there is no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
        return 2
    failed = [name for name in names if not run(name)]
    print(f"{len(names) - len(failed)} of {len(names)} rows are green; red: {', '.join(failed) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
