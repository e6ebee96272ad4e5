"""Rules that a linter has no name for, such as tolerances below 1."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_dynamic.cli.models import KNOWN
from peft_dynamic.methods import METHODS

SAYING = {".py", ".md", ".yaml", ".ipynb"}  # files that tell people what to do
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```", re.M | re.S)


def tolerances(tree: ast.AST) -> Iterator[tuple[int, float]]:
    """Line and value of each literal that is given as a tolerance, by keyword, by position or by assignment."""
    for node in ast.walk(tree):
        given: list[ast.expr] = []
        if isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = {"rtol", "atol", "tol"} | ({"rel", "abs"} if function == "approx" else set())
            given = [keyword.value for keyword in node.keywords if keyword.arg in names]
            given += node.args[2:4] if function in {"allclose", "isclose"} else node.args[1:3] * (function == "approx")
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = {getattr(target, "id", getattr(target, "attr", "")).lower() for target in targets}
            given = [node.value] * bool(named & {"rtol", "atol", "tol"})
        for value in given:
            if isinstance(value, ast.Constant) and isinstance(value.value, int | float):
                yield value.lineno, value.value


@pytest.mark.parametrize(
    "line", ["assert_close(a, b, rtol=1e6)", "allclose(a, b, 1.0)", "x == pytest.approx(2, 3)", "atol: float = 1"]
)
def test_the_lint_sees_a_tolerance_that_accepts_anything(line: str) -> None:
    assert [value >= 1 for _, value in tolerances(ast.parse(line))] == [True]


def test_no_tolerance_reaches_one(root: Path) -> None:
    found = [
        f"{path.relative_to(root)}:{line}: {value}"
        for path in sorted((root / "tests").rglob("*.py"))
        for line, value in tolerances(ast.parse(path.read_text(encoding="utf-8")))
        if value >= 1
    ]
    assert not found, f"a tolerance of 1 or more accepts anything: {found}"


CONFIGS = {method.classes[0] for method in METHODS.values()}
NO_TASK = {"plain_loop.py"}  # its model is none of transformers'


def adapters_without_a_task(code: str) -> list[str]:
    """The adapter configs in some code that do not say the task, so that nobody can tell the model's class later."""
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in CONFIGS | {"LoraConfig"}
        and not {keyword.arg for keyword in node.keywords} & {"task_type", None}
    ]


def test_every_adapter_that_is_shown_says_its_task(root: Path) -> None:
    assert adapters_without_a_task('DyLoRAConfig(r=1); LoraConfig(task_type="CAUSAL_LM"); Other()')
    found = {}
    for path in [root / "README.md", *(root / "docs").glob("*.md")]:
        for block in FENCE.finditer(path.read_text(encoding="utf-8")):
            if block["language"] == "python":
                body = re.sub(rf"^{block['indent']}", "", block["body"], flags=re.M)
                found[f"{path.name}, {block.start()}"] = adapters_without_a_task(body)
    for path in (root / "examples").glob("*.py"):
        found[path.name] = [] if path.name in NO_TASK else adapters_without_a_task(path.read_text(encoding="utf-8"))
    assert not {place: lines for place, lines in found.items() if lines}


def test_each_model_that_a_test_is_marked_with_is_fetched_by_make_models(root: Path) -> None:
    """Where CI is set a missing model is an error, so that one which nothing fetches would never be green."""
    marked = {
        argument.value
        for path in (root / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.model"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }
    fetched = re.findall(r"peft-dynamic models (.*)", (root / "Makefile").read_text(encoding="utf-8"))
    assert {"smollm2", "minilm"} < marked <= set(" ".join(fetched).split()) <= set(KNOWN)


def test_no_page_or_message_installs_this_package_from_an_index(root: Path) -> None:
    """It is on none: a message that says so sends people to an error, or to somebody else's package."""
    promise = re.compile(r"pip install[^\n`(]*?[\"' ]peft[-_]dynamic\b(?!\.)")
    assert promise.search('pip install "peft-dynamic[trl]"')
    assert not promise.search("(or, in a checkout of peft_dynamic, pip install '.[trl]')")
    places = ["peft_dynamic", "trainers", "examples", "docs", "benchmarks"]
    paths = [root / "README.md", root / "CONTRIBUTING.md"]
    paths += [path for place in places for path in (root / place).rglob("*") if path.suffix in SAYING]
    assert len(paths) > 200
    assert not [str(path.relative_to(root)) for path in paths if promise.search(path.read_text(encoding="utf-8"))]


def test_the_packages_that_messages_name_are_those_of_the_extra(root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named: dict[tuple[str, str], str] = {}
    for path in [*(root / "peft_dynamic").rglob("*.py"), *(root / "trainers").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "how_to_install":
                literal = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                named |= {(literal[0], package): path.name for package in literal[1:]}
    assert ("trl", "trl>=1.16") in named
    for (extra, package), name in named.items():
        wanted = re.compile(rf"{re.escape(package)}(?![\w.])")
        assert any(wanted.match(requirement) for requirement in extras[extra]), f"{name}: {package} is not in {extra}"
