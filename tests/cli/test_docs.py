"""docs/command.md has every verb and the exit codes. tests/packaging/test_commands.py runs its examples."""

import re
from pathlib import Path

import typer

from peft_dynamic.cli import app
from peft_dynamic.cli._answer import EXIT_CODES, UNFINISHED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
VERBS = {str(each.callback.__name__) for each in app.registered_commands if each.callback}


def test_every_verb_is_on_the_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+ \| `peft-dynamic (\w+) .*` \|$", PAGE, re.MULTILINE)
    assert [verb for verb, _ in rows] == [verb for _, verb in rows]
    assert {verb for verb, _ in rows} == VERBS
    assert len(rows) == len(VERBS)


def test_the_exit_codes_are_those_of_the_command() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == EXIT_CODES
    assert UNFINISHED in EXIT_CODES


def test_every_light_verb_answers_programs() -> None:
    command = typer.main.get_command(app)
    for verb in VERBS - {"train", "sft", "soft", "ppo", "cite", "classify", "chat", "app"}:
        options = {name for each in command.commands[verb].params for name in each.opts}  # type: ignore[attr-defined]
        assert "--json" in options, verb
        assert ("--dry-run" in options) == (verb in {"resize", "merge", "average", "export", "push"}), verb
