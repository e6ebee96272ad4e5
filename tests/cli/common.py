"""What the tests of the command share: rows, a tiny model, and the command in this process and in one of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from peft_dynamic.cli import app
from tests.processes import Started

ROWS = [{"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("one", "two", "three", "four", "five", "six")]
HERE = Path(__file__).parents[2]


def write(path: Path, rows: list) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# What a user's terminal says about itself must not decide a test.
TERMINAL = {
    *("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "TERM", "LINES", "TTY_COMPATIBLE", "GITHUB_ACTIONS"),
    *("PYTHONIOENCODING", "TRANSFORMERS_VERBOSITY", "PEFT_DYNAMIC_DEBUG"),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with nothing in it, and the same terminal everywhere."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setenv("COLUMNS", "400")
    for name in TERMINAL:
        monkeypatch.delenv(name, raising=False)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def message(result: Any) -> str:
    """The error's text, without the box around it and its colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).replace("│", " ").split())


def environment(**more: str) -> dict[str, str]:
    """For a process of its own: this one's, less what the terminal says, with this checkout on the path."""
    kept = {name: value for name, value in os.environ.items() if name not in TERMINAL}
    return kept | {"PYTHONPATH": str(HERE), "COLUMNS": "400", "PYTHONUTF8": "1"} | more


def command(*arguments: object, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, in another folder than the checkout."""
    words = [sys.executable, "-m", "peft_dynamic.cli", *map(str, arguments)]
    return subprocess.run(
        words, capture_output=True, text=True, encoding="utf-8", cwd=cwd or Path.cwd(), env=environment(**more)
    )


FORKED = """
import sys
from transformers.utils import logging
logging.disable_progress_bar()  # by a variable that the command sets, which is read when the hosts are imported
sys.argv[0] = "bin/peft-dynamic"
{before}
from peft_dynamic.cli import main
main()
"""
# What stock PEFT says of an export in a process of its own, for runs that are not about it: it takes seconds.
CHECK = "peft_dynamic.cli._run.check_in_stock_peft"
AGREED = {"equal": True, "difference": 0.0, "scale": 1.0, "loss": 1.0, "rank": 1}


def start(*arguments: object, cwd: Path | None = None, check: bool = True, **more: str) -> Started:
    """The same in a process that has imported the hosts."""
    before = "" if check else f"import peft_dynamic.cli._run\n{CHECK} = lambda *a, **k: {AGREED}"
    return Started("-c", (FORKED.format(before=before), *arguments), cwd or Path.cwd(), environment(**more))


def forked(*arguments: object, cwd: Path | None = None, check: bool = True, **more: str) -> subprocess.CompletedProcess:
    """What came of it."""
    return start(*arguments, cwd=cwd, check=check, **more).ended(timeout=280)


def run_train(*options: object, run: Callable[..., subprocess.CompletedProcess] = command) -> str:
    """The output of `peft-dynamic train` in a process of its own."""
    folder = Path(str(options[options.index("--output") + 1])).parent
    done = run("train", *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""  # nothing that hosts say, and no bars
    return done.stdout


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model of a few thousand weights, with a tokenizer of letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.stock_cases import build

    folder = tmp_path_factory.mktemp("tiny")
    letters = {letter: i for i, letter in enumerate(["</s>", "?", *"abcdefghijklmnopqrstuvwxyz !.,ONSAY\n:"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="?")
    fast.save_pretrained(folder)
    model = build("llama")[0]
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    return folder
