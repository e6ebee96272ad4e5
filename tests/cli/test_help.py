"""What the command costs before it works, and what reaches the terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dynamic.cli import app
from tests.cli import common
from tests.cli.common import ROWS, command, environment, invoke, message, write
from tests.processes import python

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures

HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "huggingface_hub", "numpy", "tokenizers"}
PROBE = """
import sys
sys.argv = [{argv0!r}, *{arguments!r}]
from peft_dynamic.cli import main
try:
    main()
except SystemExit as stop:
    print("CODE", stop.code)
print("HEAVY", sorted({heavy!r} & set(sys.modules)))
"""


def probe(arguments: list[str], argv0: str = "/some/where/bin/peft-dynamic") -> str:
    """What the console script does and imports, in a fresh process."""
    code = PROBE.format(argv0=argv0, arguments=arguments, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", env=environment(), check=True
    )
    assert not done.stderr or "Usage" in done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "verb",
    [
        [],
        *([verb] for verb in ("train", "export", "models", "measure", "inspect", "resize")),
        *([verb] for verb in ("push", "card", "chat", "app")),
    ],
)
def test_help_waits_for_no_library(verb: list[str]) -> None:
    printed = probe([*verb, "--help"])
    assert "Usage: peft-dynamic" in printed
    assert "CODE 0" in printed
    assert "HEAVY []" in printed


def test_every_verb_has_an_example() -> None:
    verbs = {str(each.callback.__name__) for each in app.registered_commands if each.callback}
    assert verbs >= {"train", "export", "measure", "inspect", "resize", "merge", "average", "models", "push", "card"}
    for verb in verbs:
        assert f"For example: peft-dynamic {verb} " in message(invoke(verb, "--help"))


def test_a_slip_in_the_arguments_waits_for_no_library() -> None:
    assert "HEAVY []" in probe(["train", "--steps", "0"])
    assert "HEAVY []" in probe(["trian"])
    assert "HEAVY []" in probe(["measure", "a/b", "--data", "x.jsonl", "--minutes", "0"])
    assert "HEAVY []" in probe(["inspect", "nowhere"])
    assert "HEAVY []" in probe(["chat", "nowhere", "--temperature", "-1"])
    assert "HEAVY []" in probe(["resize", "nowhere", "out", "--rank", "2"])
    assert "HEAVY []" in probe(["push", "nowhere", "me/poet"])
    assert "HEAVY []" in probe(["card", "nowhere"])
    assert "HEAVY []" in probe(["models", "gpt5"], "peft-dynamic.exe")


def test_as_a_module_it_waits_for_nothing_either() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "peft_dynamic.cli", "--help"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment(),
        check=True,
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "peft_dynamic" in imported
    assert not imported & HEAVY


def test_everywhere_else_the_import_registers_all_methods() -> None:
    code = """
import peft_dynamic
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
assert {"DYLORA", "QDYLORA", "MOSLORA", "LORETTA_REP", "LORETTA_ADP", "DENSITY_LORA"} <= set(known), set(known)
"""
    python("-c", code, env=environment())


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["/x/bin/peft-dynamic", "train"], [], True),
        (["C:/x/peft-dynamic.exe"], [], True),
        (["-m", "--help"], ["python", "-m", "peft_dynamic.cli", "--help"], True),
        (["-m"], ["python", "-Im", "-mpeft_dynamic.cli"], True),
        (["-m"], ["python", "-m", "pytest"], False),
        (["-m"], ["python", "-m", "peft_dynamic_client"], False),
        (["/x/peft_dynamic/cli/__main__.py"], ["python", "-m", "peft_dynamic.cli"], False),  # too late: it is imported
        (["/x/peft-dynamic-train.py"], [], False),
        (["/x/peft-dynamic.d/run.py"], [], False),
        (["-c"], [], False),
        ([""], [], False),
        ([], [], False),
    ],
)
def test_the_command_is_known_by_how_it_was_started(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], original: list[str], expected: bool
) -> None:
    import peft_dynamic

    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert peft_dynamic._is_the_command() == expected


def test_in_the_command_the_names_are_there_when_they_are_used() -> None:
    code = """
import sys
sys.argv = ["bin/peft-dynamic"]
import peft_dynamic
assert "torch" not in sys.modules
assert peft_dynamic.__version__
from peft_dynamic import DyLoRAConfig, export_lora
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
assert "MOSLORA" in known
assert peft_dynamic.DyLoRAConfig is DyLoRAConfig is known["DYLORA"]
for name in peft_dynamic.__all__:
    getattr(peft_dynamic, name)
try:
    peft_dynamic.nothing
except AttributeError as error:
    assert "has no attribute 'nothing'" in str(error)
else:
    raise SystemExit("a name that is not there")
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), capture_output=True)


def test_an_unforeseen_error_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RecursionError("deep\ndown")

    monkeypatch.setattr("peft_dynamic.cli.train.read_rows", fail)
    options = ("train", "--model", tiny, "--data", write(tmp_path / "d.jsonl", ROWS))
    result = invoke(*options)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "Error: RecursionError: deep down" in message(result)
    assert "PEFT_DYNAMIC_DEBUG=1 shows where it came from" in message(result)
    monkeypatch.setenv("PEFT_DYNAMIC_DEBUG", "1")
    assert isinstance(invoke(*options).exception, RecursionError)


def test_the_hosts_warnings_are_hushed_and_ours_are_lines(capfd: pytest.CaptureFixture[str]) -> None:
    import logging
    import warnings

    from peft_dynamic.cli._edge import hosts_hushed

    with hosts_hushed():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.warn_explicit("of a host", category, "peft/x.py", 1, module="peft.x")
        warnings.warn_explicit("deprecated by a host, in our line", FutureWarning, "x.py", 1, module="peft_dynamic.x")
        warnings.warn_explicit("of ours", UserWarning, "x.py", 1, module="peft_dynamic.x")
        logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU.")
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
    assert capfd.readouterr().err == "Warning: of ours\n"


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, {"LC_ALL": "C", "COLUMNS": "40", "PYTHONUTF8": "0"}]
)
def test_a_poor_terminal_costs_letters_not_the_run(variables: dict[str, str]) -> None:
    name = os.fsdecode("m/ü\u2028".encode())  # as it comes from a file system, whatever this locale can name
    done = command("train", "--model", name, "--data", "keine.jsonl", **variables)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert command("--help", **variables).returncode == 0
