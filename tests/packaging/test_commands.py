"""Every command that a page, an example or a help text shows is one that its program takes.

bash reads the blocks, with stand-ins for all programs that write down what they were called with: so continuation
lines, variables, comments and quotes are the shell's. What was called then goes to the real parser of that program, and
the light verbs of `peft-dynamic` run to their end on tiny files. Words in capitals and names such as `my/model` are
folders and files that `home` makes.
"""

import argparse
import ast
import re
import runpy
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from packaging.requirements import Requirement
from typer.testing import CliRunner

from peft_dynamic.cli import app
from tests.packaging.tiny import adapter, bert, llama

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")]
PAGES += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").glob("*/README.md"))]
EXAMPLES = [path for path in sorted((ROOT / "examples").rglob("*")) if path.suffix in {".py", ".sh", ".yaml"}]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```", re.M | re.S)
OURS = ("peft-dynamic", "python", "accelerate", "torchrun", "make", "pip", "bash")
# Of these nothing is checked: they are programs of others, and their words no names of ours
OTHERS = ("git", "pre-commit", "mkdocs", ".venv-test/bin/mkdocs")
SCRIPT = re.compile(rf"^(?:# +| {{4}})((?:{'|'.join(OURS)}) (?:.*\\\n)*.*)$", re.M)
INLINE = re.compile(rf"`((?:{'|'.join(OURS)}) [^`]+)`")
# Words that stand for something: for which the test puts something in
MEANT = {"VERB": "sft", "name": "any_rank", "b": "4"}
YOURS = {"my_trl_script.py": "a script of the reader's own"}
FIRST, SECOND = slice(1, 2), slice(2, 3)
WRITTEN = {"resize": SECOND, "export": SECOND, "merge": FIRST, "average": FIRST}  # which word is the folder to write
WINDOWS = 1  # blocks of PowerShell, which no shell here reads

Command = tuple[str, bool]  # a script, and whether it is only named: in a sentence, arguments may be left out


def shown(path: Path) -> list[Command]:
    """The commands in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [(found, False) for found in SCRIPT.findall(ast.get_docstring(ast.parse(text)) or "")]
    if path.suffix in {".sh", ".yaml"}:
        return [(re.sub(r"\n# *", "\n", found), False) for found in SCRIPT.findall(text)]
    blocks = [each for each in FENCE.finditer(text) if each["language"] in {"bash", "sh", "shell", "console"}]
    rest = FENCE.sub("", text)
    found = [(re.sub(rf"^{each['indent']}", "", each["body"], flags=re.M), False) for each in blocks]
    found += [(each, False) for each in SCRIPT.findall(rest)]
    return found + [(" ".join(each.split()), True) for each in INLINE.findall(rest)]


def helps() -> list[Command]:
    """The examples in the help of the verbs."""
    from peft_dynamic.cli import cite, classify, ppo, sft, soft

    texts = [str(each.callback.__doc__) for each in app.registered_commands if each.callback]
    texts += [each.VERB.help() for each in (cite, classify, ppo, sft, soft)]
    found = [text.partition("For example: ")[2].partition("\n\n")[0] for text in texts]
    assert all(found)
    return [(" ".join(each.split()), False) for each in found]


def called(script: str, folder: Path) -> list[list[str]]:
    """The programs that a script calls, with their words; a program that is not known stops it."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("peft-dynamic", "python", "accelerate", "torchrun", "make", "pip", "bash", *OTHERS[:-1]):
        (programs / name).write_text(
            f'#!/bin/sh\nfor word in {name} "$@"; do printf \'%s\\037\' "$word"; done >> "$CALLED"\n'
            "printf '\\036' >> \"$CALLED\"\n"
        )
        (programs / name).chmod(0o755)
    kept = folder / "called"
    kept.write_text("")
    bash = shutil.which("bash")
    assert bash is not None
    environment = {"PATH": str(programs), "CALLED": str(kept)}
    done = subprocess.run([bash, "-eu"], input=script, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stderr}"
    calls = [call.split("\037")[:-1] for call in kept.read_text(encoding="utf-8").split("\036")[:-1]]
    assert calls, f"nothing is called: {script}"
    return calls


class Parsed(BaseException):
    """Raised once a parser has read its words, in place of all that comes after."""


def refused(error: object, words: list[str]) -> AssertionError:
    return AssertionError(f"{' '.join(words)}\n{error}")


class Checks:
    """The programs that commands are for, by name."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, output: Callable[[], str]) -> None:
        self.folder, self.patch, self.output = folder, patch, output
        self.done: dict[str, int] = {}

    def check(self, words: list[str], named: bool = False) -> None:
        """Raise AssertionError unless a program takes its words."""
        if words[-1] == "..." or words[-1].endswith("..."):
            words, named = words[:-1], True
        words = [MEANT.get(word, word) if number else word for number, word in enumerate(words)]
        program, rest = words[0], words[1:]
        if program not in OTHERS:
            self.done[program] = self.done.get(program, 0) + 1
            getattr(self, program.replace("-", "_"))(rest, named)

    def peft_dynamic(self, words: list[str], named: bool) -> None:
        command: Any = typer.main.get_command(app)
        if named and all(word.startswith("-") for word in words[1:]) and words[0] in command.commands:
            verb = command.commands[words[0]]
            known = {name for each in verb.params for name in each.opts} | {"--help"}
            wrong = [word for word in words[1:] if word not in known]
            assert not wrong, f"peft-dynamic {words[0]} has no {wrong}"
            return
        if words[0] == "push" and "--dry-run" not in words:
            words = [*words, "--dry-run"]
        # What it writes is not there yet, and is what it was for the next command
        place = self.folder / {"train": "peft-dynamic-out"}.get(
            words[0], "".join(words[WRITTEN.get(words[0], slice(0))])
        )
        if there := place.exists() and place != self.folder:
            place.rename(self.folder / "aside")
        result = CliRunner().invoke(app, words, input="Say it.\n")
        if there:
            shutil.rmtree(place, ignore_errors=True)
            (self.folder / "aside").rename(place)
        if result.exit_code:
            raise refused(result.output, ["peft-dynamic", *words])

    def python(self, words: list[str], named: bool) -> None:
        if words[0] == "-m":
            module, rest = words[1], words[2:]
            if module == "peft_dynamic.cli":
                return self.peft_dynamic(rest, named)
            assert module == "benchmarks", f"python {' '.join(words)}: nobody knows how to check that"
            return self.study(rest)
        if words[0] in YOURS:
            return None
        path = ROOT / words[0]
        assert path.is_file(), f"{words[0]} is not there"
        if path.parent.name == "docs" and len(words) == 1:  # most of them make pages, and take no words
            return None
        if words[1:] == ["--config", "soft.yaml"]:  # of the example, whose names are others than the verb's
            names = {"model": "my/model", "data": "my.jsonl", "output_dir": "out/soft"}
            (self.folder / "soft.yaml").write_text(yaml.safe_dump(names))
        self.patch.setattr("sys.argv", words)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Parsed:
            return None
        except (SystemExit, Exception) as error:
            raise refused(f"{error!r}\n{self.output()}", words) from error
        raise refused("it has no parser", words)

    def study(self, words: list[str]) -> None:
        from benchmarks.__main__ import chosen, parsed, selected

        self.patch.setattr("sys.argv", ["benchmarks", *words])
        try:
            options, study = parsed()
            selected(chosen(study, options).cells(), options.only)
        except (SystemExit, Exception) as error:
            if words or (isinstance(error, SystemExit) and error.code):
                raise refused(f"{error!r}\n{self.output()}", ["python", "-m", "benchmarks", *words]) from error

    def accelerate(self, words: list[str], named: bool) -> None:
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser

        assert words[0] == "launch"
        if named and len(words) == 1:
            return
        self.launched(launch_command_parser(), words[1:], named, _validate_launch_command)

    def torchrun(self, words: list[str], named: bool) -> None:
        from torch.distributed.run import get_args_parser

        self.launched(get_args_parser(), words, named)

    def launched(
        self,
        parser: argparse.ArgumentParser,
        words: list[str],
        named: bool,
        more: Callable[[Any], object] | None = None,
    ) -> None:
        try:
            given = parser.parse_known_args(words)[0]
            if more is not None and given.config_file is not None:  # without it accelerate reads this machine's own
                more(given)
        except (SystemExit, Exception) as error:
            raise refused(f"{error!r}\n{self.output()}", words) from error
        start = ["-m"] if given.module else []
        self.check(["python", *start, given.training_script, *given.training_script_args], named)

    def make(self, words: list[str], named: bool) -> None:
        text = (ROOT / "Makefile").read_text(encoding="utf-8")
        set_to = dict(word.split("=", 1) for word in words if "=" in word)
        for name in [word for word in words if "=" not in word]:
            assert re.search(rf"^(?:[\w-]+ )*{name}(?: [\w-]+)*:", text, re.M), f"make {name}: there is no such target"
        unknown = [name for name in set_to if f"$({name})" not in text and f"ifdef {name}" not in text]
        assert not unknown, f"make {' '.join(words)}: the Makefile has no {unknown}"
        if words[0] == "bench" and not (named and "STUDY" not in set_to):
            arguments = [set_to.get("STUDY", ""), *shlex_split(set_to.get("ARGS", ""))]
            self.study([word for word in arguments if word])

    def pip(self, words: list[str], named: bool) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if words[0] != "install":
            return
        for word in words[1:]:
            if word.startswith("."):
                extras = Requirement(f"here{word[1:]}").extras
                assert extras <= set(project["optional-dependencies"]), f"pip install {word}: which extra?"
            elif not word.startswith("-"):
                Requirement(word)

    def bash(self, words: list[str], named: bool) -> None:
        assert (ROOT / words[0]).is_file(), f"bash {words[0]}: it is not there"


def shlex_split(text: str) -> list[str]:
    import shlex

    return shlex.split(text)


def recipe_files() -> None:
    """The settings that commands name: docs/train.md's for sft, and the least that the other verbs need."""
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    Path("sft.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    least = {"model_name_or_path": "my/model", "dataset_name": "my.jsonl"}
    for verb in ("soft", "ppo", "cite", "classify"):
        Path(f"{verb}.yaml").write_text(yaml.safe_dump(least | {"output_dir": f"out/{verb}"}))
    names = {"train_file": "my.jsonl", "eval_file": "eval.jsonl", "output_dir": "out/ppo", "use_cpu": True}
    Path("my.yaml").write_text(yaml.safe_dump(names | {"model_name_or_path": "my/model", "bf16": False}))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands name."""
    from transformers import T5ForConditionalGeneration

    from peft_dynamic import DyLoRAConfig
    from tests.trainers.citation.common import tiny_t5, tokenizer

    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        models = {"my/model": llama(2), "runs/soft": llama(13), "HuggingFaceTB/SmolLM2-135M-Instruct": llama(2)}
        models |= {"answerdotai/ModernBERT-base": bert(), "google/flan-t5-small": T5ForConditionalGeneration(tiny_t5())}
        for name, model in models.items():
            model.save_pretrained(name)
            tokenizer(chat=True, end="t5" in name).save_pretrained(name)
        for name in ("runs/sql", "runs/chat", "run/checkpoint-100", "run/checkpoint-200", "other/adapter"):
            adapter(Path(name))
        for checkpoint in ("runs/sql/checkpoint-100", "runs/sql/checkpoint-200", "ADAPTER", "OTHER"):
            adapter(Path(checkpoint))
        ranked = {"config": DyLoRAConfig, "ranks": [1, 2, 4, 8, 16, 32]}
        for name in ("runs/dylora", "adapter", "peft-dynamic-out/adapter", "OUT"):
            adapter(Path(name), **ranked)
        row = '{"prompt": "The sea is ", "completion": "wide."}\n'
        for name in ("my", "eval", "held-out", "calibration", "train", "prompts", "cited"):
            Path(f"{name}.jsonl").write_text(row * 8)
        for name in ("mnli.jsonl", "claims.jsonl", "mnli_val.jsonl", "attributionbench_val.jsonl"):
            Path(name).write_text('{"premise": "A", "hypothesis": "B", "label": 0}\n')
        Path("attributionbench.jsonl.gz").write_bytes(b"")
        Path("prompts.txt").write_text("The sea is\n")
        recipe_files()
        for name in ("DATA", "MODELS", "JUDGE", "DIR", "MODEL"):
            Path(name).mkdir()
        Path("examples").symlink_to(ROOT / "examples", target_is_directory=True)
    return folder


@pytest.fixture
def checks(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Checks:
    """In a copy of the files, with stand-ins for what takes long: training, downloads and the server of `app`."""
    from trl import TrlParser

    folder = tmp_path / "home"
    shutil.copytree(files, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(ROOT / "examples")  # as python does for a script

    def stops(read: Callable[..., Any]) -> Callable[..., Any]:
        def parse(self: Any, *arguments: Any, **settings: Any) -> Any:
            found = read(self, *arguments, **settings)
            raise Parsed(found)

        return parse

    monkeypatch.setattr("peft_dynamic.cli._load.fast_dtype", lambda: torch.float32)  # whatever is fast here
    monkeypatch.setattr("peft_dynamic.cli._run.run", lambda job: None)
    monkeypatch.setattr("peft_dynamic.cli._fit._train", lambda *given: None)
    monkeypatch.setattr("peft_dynamic.cli._page.serve", lambda *given: None)
    monkeypatch.setattr("peft_dynamic.cli.models.fetch", lambda name, *given: Path(name))
    found = Checks(folder, monkeypatch, lambda: "".join(capsys.readouterr()))
    plain = found.python

    def python(words: list[str], named: bool) -> None:  # only examples stop at their parsers, not our own command
        with monkeypatch.context() as inner:
            if words[0] != "-m":
                inner.setattr(argparse.ArgumentParser, "parse_args", stops(argparse.ArgumentParser.parse_args))
                inner.setattr(TrlParser, "parse_args_and_config", stops(TrlParser.parse_args_and_config))
            plain(words, named)

    found.python = python
    return found


@pytest.mark.parametrize(
    "path", [path for path in PAGES + EXAMPLES if shown(path)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_commands_of_a_file_are_what_their_programs_take(path: Path, checks: Checks) -> None:
    for script, named in shown(path):
        for words in called(script, checks.folder):
            checks.check(words, named)


def test_the_commands_in_the_help_are_what_the_verbs_take(checks: Checks) -> None:
    for script, named in helps():
        for words in called(script, checks.folder):
            checks.check(words, named)
    assert checks.done == {"peft-dynamic": len(helps())}


def settings_blocks() -> list[tuple[str, str]]:
    """The YAML blocks of the pages: the file that the first line names, and what is in it."""
    blocks = [each for path in PAGES for each in FENCE.finditer(path.read_text(encoding="utf-8"))]
    return [(each["body"].split()[1], each["body"]) for each in blocks if each["language"] in {"yaml", "yml"}]


@pytest.mark.parametrize(("name", "text"), settings_blocks())
def test_a_block_of_settings_is_what_its_verb_takes(name: str, text: str, checks: Checks) -> None:
    run = ["peft-dynamic", name.removesuffix(".yaml"), "--config", name]
    Path(name).write_text(text, encoding="utf-8")
    checks.check(run)
    Path(name).write_text(text + "learning_rat: 1\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="learning_rat is not known"):
        checks.check(run)


def test_no_block_is_passed_over() -> None:
    fences = [each["language"] for path in PAGES for each in FENCE.finditer(path.read_text(encoding="utf-8"))]
    shells = {"bash", "sh", "shell", "console", "zsh", "powershell", "cmd", "bat"}
    assert fences.count("powershell") == WINDOWS
    assert shells & set(fences) == {"bash", "powershell"}
    assert {*fences} - shells == {"python", "yaml", "text"}
    assert sum(len(shown(path)) for path in PAGES + EXAMPLES) > 150


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("peft-dynamic trian --demo", "No such command 'trian'"),
        ("peft-dynamic resize ADAPTER OUT --rang 4", "No such option: --rang"),
        ("peft-dynamic resize ADAPTER OUT --rank four", "Invalid value for '?--rank"),
        ("peft-dynamic resize ADAPTER OUT", "Invalid value for --rank"),
        ("peft-dynamic resize ADAPTER", "(?i)missing argument"),
        ("peft-dynamic export runs/dylora out/rank-64 --rank 64", "64"),
        ("peft-dynamic train --model my/model --data my.jsonl --ranks 2,4 --rank 8", "No such option: --rank"),
        ("peft-dynamic sft --config sft.yaml --learning_rat 1", "Was --learning_rate meant"),
        ("accelerate launch --number 2 examples/soft.py --toy", "2 is not there"),
        ("accelerate launch --config_file examples/accelerate/none.yaml examples/soft.py --toy", "none.yaml"),
        ("torchrun -m peft_dynamic.cli stf", "No such command 'stf'"),
        ("python examples/soft.py --toys", "--toys"),
        ("python examples/classify.py --model MODEL", "required: --train, --eval"),
        ("python examples/nothing.py", "examples/nothing.py is not there"),
        ("python -m benchmarks growth --only nothing=1", "no cell has nothing"),
        ("make bench STUDY=soft_cost", "pass --data"),
        ("make tests", "no such target"),
        ("make test-floor TORHC=2.7.0", "TORHC"),
        ("pip install '.[tlr]'", "which extra"),
        ("peft-dynamic inspect $nothing", "unbound variable"),
        ("peft-dymanic inspect ADAPTER", "command not found"),
    ],
)
def test_a_wrong_command_is_seen(script: str, error: str, checks: Checks) -> None:
    with pytest.raises(AssertionError, match=error):
        checks.check(called(script, checks.folder)[0])
