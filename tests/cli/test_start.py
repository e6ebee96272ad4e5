"""The command answers at once: help, the version and bad arguments import no library; and what it tells programs."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from peft_dynamic import __version__
from peft_dynamic.cli import app
from peft_dynamic.cli._answer import answering
from peft_dynamic.cli._given import check_file
from peft_dynamic.cli._subject import largest_rank
from tests.cli import common
from tests.cli.common import ROWS, environment, invoke, message, write

elsewhere = common.elsewhere  # a fixture

HEAVY = ["torch", "transformers", "peft", "trl", "datasets", "accelerate", "huggingface_hub", "numpy", "safetensors"]
VERBS = sorted(str(each.callback.__name__) for each in app.registered_commands if each.callback)
PROBE = """
import json, sys
sys.argv = ["/some/where/bin/peft-dynamic"]
from peft_dynamic.cli import main
for words in json.loads({cases!r}):
    sys.argv[1:] = words
    print("CASE", *words)
    try:
        main()
    except SystemExit as stop:
        print("CODE", stop.code, sorted(set({heavy!r}) & set(sys.modules)))
"""


def started(cases: list[list[str]]) -> list[str]:
    """For each call, one after the other in one fresh process: its exit code, and what was imported by then."""
    code = PROBE.format(cases=json.dumps(cases), heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", env=environment(), check=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("CASE", "CODE"))]
    assert [line.split()[0] for line in lines] == ["CASE", "CODE"] * len(cases), done.stdout + done.stderr
    return [f"{case.removeprefix('CASE ')}: {code}" for case, code in zip(lines[::2], lines[1::2], strict=True)]


def test_help_and_versions_import_nothing() -> None:
    cases = [["--help"], ["--version"], ["--version", "--json"], *([verb, "--help"] for verb in VERBS)]
    assert started(cases) == [f"{' '.join(words)}: CODE 0 []" for words in cases]


def test_bad_arguments_import_nothing(tmp_path: Path) -> None:
    data = str(write(tmp_path / "data.jsonl", ROWS))
    (tmp_path / "file").write_text("")
    kinds = {"lora": {"peft_type": "LORA", "r": 4}, "adp": {"peft_type": "LORETTA_ADP", "r": 4}}
    for name, config in kinds.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    lora, adp, file = (str(tmp_path / name) for name in ("lora", "adp", "file"))
    cases = [
        ["inspct"],
        ["--json"],
        ["inspect"],
        ["inspect", "nowhere"],
        ["inspect", adp],
        ["inspect", lora, "--plot", "x.txt"],
        ["resize", lora, "out"],
        ["resize", lora, "out", "--rank", "5"],
        ["resize", lora, file, "--rank", "2"],
        ["resize", lora, lora, "--rank", "2"],
        ["resize", adp, "out", "--rank", "2"],
        ["resize", lora, "out", "--rank", "2", "--data", "gone.jsonl"],
        ["merge", "out", "nowhere=1"],
        ["merge", file, f"{lora}=1"],
        ["merge", "out", f"{lora}=1", "--rank", "0"],
        ["average", "out", lora, "nowhere"],
        ["average", lora, lora, lora],
        ["measure", lora, "--data", data, "--ranks", "5"],
        ["measure", adp, "--data", data],
        ["measure", lora, "--data", data, "--minutes", "0"],
        ["compare", lora, "--data", data],
        ["compare", "base", f"{lora}@5", "--data", data],
        ["compare", "base", f"{lora}@x", "--data", data],
        ["compare", "base", lora, adp, "--data", data],
        ["export", "nowhere", "out"],
        ["export", lora, "out"],
        ["export", adp, "out"],
        ["export", lora, "out", "--merge", "--depth", "0"],
        ["export", lora, "out", "--merge", "--rank", "2"],
        ["export", lora, file, "--merge"],
        ["models", "gpt5"],
        ["train", "--steps", "0"],
    ]
    assert started(cases) == [f"{' '.join(words)}: CODE 2 []" for words in cases]


def test_the_version_is_a_line_and_with_json_all_versions() -> None:
    assert invoke("--version").stdout == f"peft-dynamic {__version__}\n"
    found = json.loads(invoke("--version", "--json").stdout)
    assert list(found) == ["peft_dynamic", "torch", "peft", "transformers", "trl"]
    assert (found["peft_dynamic"], found["peft"]) == (__version__, version("peft"))
    result = invoke("--json")
    assert result.exit_code == 2
    assert "--json: goes with --version here." in message(result)


def test_an_answer_is_one_object_and_talk_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(True) as answer:
        print("talk")
        answer |= {"a": float("nan"), "b": [Path("x"), float("-inf")], 3: True}
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": None, "b": ["x", None], "3": True}
    assert err == "talk\n"
    with answering(False):
        print("talk")
    assert capsys.readouterr() == ("talk\n", "")
    with pytest.raises(typer.BadParameter), answering(True) as answer:
        answer["half"] = check_file(Path("."), "--out")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"r": 4}, 4),
        ({"r": 4, "rank_pattern": {"q": 8}}, 8),
        ({"r": 4, "rank_pattern": None}, 4),
        ({"r": "4"}, float("inf")),
        ({}, float("inf")),
        ({"r": 4, "rank_pattern": {"q": True}}, float("inf")),
        ({"r": 4, "peft_type": "LORETTA_REP"}, float("inf")),  # with noise removal it has twice as many
    ],
)
def test_the_largest_rank_by_the_configuration(config: dict, expected: float) -> None:
    assert largest_rank(config) == expected
