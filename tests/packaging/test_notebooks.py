"""The notebooks run from top to bottom on tiny models, and what is kept of their real runs is whole."""

import json
import os
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nbformat
import pytest
from transformers import T5ForConditionalGeneration

from tests import processes
from tests.packaging.tiny import bert, llama
from tests.trainers.citation.common import tiny_t5, tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
SCRIPT = runpy.run_path(str(ROOT / "docs" / "make_notebooks.py"))
LARGEST = 250_000  # bytes

TOY: dict[str, dict[str, Any]] = {
    "rank-of-a-lora": {"MODEL": "encoder", "DATA": "reviews", "ROWS": 10, "STEPS": 2, "RANK": 4},
    "pick-a-rank": {"MODEL": "decoder", "STEPS": 2, "TEST_ROWS": 2, "RANKS": [1, 2]},
    "exit-early": {"MODEL": "decoder", "EXITS": [2, 4], "WEIGHTS": [1, 1], "STEPS": 1, "TEST_ROWS": 2},
    "few-neurons": {"MODEL": "encoder", "DATA": "reviews", "ROWS": 10, "STEPS": 4},
    "rewards": {"LABELLED": 4, "START_STEPS": 2, "ROLLOUTS": 1, "PROMPTS": 4, "TEST_PROMPTS": 2},
    "cite": {"MODEL": "t5", "DATA": "questions", "ROWS": 4, "TEST_ROWS": 4, "EPOCHS": 1},
    "merging": {"MODEL": "decoder", "DATA": "reviews", "STEPS": 1, "TEST_ROWS": 2},
}
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# A place on somebody's disk: a home, a folder for temporary files or of this checkout
MACHINE = re.compile(r"/(?:home|root|tmp|Users|usr|opt|mnt|var)/|[A-Z]:\\")


def source(cell: Any) -> str:
    return "".join(cell["source"])


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_each_task_has_its_notebook_and_links_to_it() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in NOTEBOOKS} == {*TOY} == {*SCRIPT["REAL"]}
    for name in TOY:
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert f"](notebooks/{name}.ipynb)" in page
        assert f"]({name}.ipynb)" in index
        assert f"docs/notebooks/{name}.ipynb.md" in nav


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_is_one_whole_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    nbformat.validate(json.loads(text))
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if not SCRIPT["kept"](output)], "a progress bar or a warning"
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not MACHINE.findall("".join(texts))
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert {*SCRIPT["REAL"][path.stem], *TOY[path.stem]} <= {*re.findall(r"^(\w+) =", source(tagged[0]), re.M)}
    assert not MACHINE.search(source(tagged[0])), "the parameters are those of a run here"


def reviews(folder: Path) -> None:
    folder.mkdir()
    for split in ("train", "validation"):
        rows = [{"sentence": f"an old man {i} went fishing", "label": i % 2} for i in range(12)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(folder: Path) -> None:
    """Of SQuAD's form."""
    folder.mkdir()
    for split in ("train", "validation"):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(4):
                context = f"The sea is wide. Man {i} went fishing in {split}. He wrote a book."
                answer = {"text": ["fishing"], "answer_start": [context.index("fishing")]}
                row = {"question": f"what did man {i} do", "context": context, "answers": answer}
                file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny models and the data that `TOY` names."""
    folder = tmp_path_factory.mktemp("home")
    for name, model, words in (
        ("encoder", bert(), tokenizer()),
        ("decoder", llama(4), tokenizer(chat=True)),
        ("t5", T5ForConditionalGeneration(tiny_t5()), tokenizer(end=True)),
    ):
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    reviews(folder / "reviews")
    questions(folder / "questions")
    return folder


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a kernel for each notebook alone: a forked process, where processes can be forked."""
    words = [sys.executable, "-m", "ipykernel_launcher"]
    with ExitStack() as open_as_long:
        if os.name == "posix":
            code = "from ipykernel.kernelapp import launch_new_instance; launch_new_instance()"
            open_as_long.enter_context(processes.programs(tmp_path / "bin", kernel=code))
            words = [str(tmp_path / "bin" / "kernel")]
        spec = {"argv": [*words, "-f", "{connection_file}"], "display_name": "forked", "language": "python"}
        place = tmp_path / "jupyter" / "kernels" / "forked"
        place.mkdir(parents=True)
        (place / "kernel.json").write_text(json.dumps(spec))
        for name in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "HF_HOME"):
            monkeypatch.setenv(name, str(tmp_path / "jupyter"))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        yield "forked"


@pytest.mark.parametrize("name", TOY)
def test_a_notebook_runs_from_top_to_bottom(name: str, home: Path, kernel: str, tmp_path: Path) -> None:
    parameters = {key: str(home / value) if key in ("MODEL", "DATA") else value for key, value in TOY[name].items()}
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    made = SCRIPT["executed"](notebook, parameters, tmp_path, kernel_name=kernel, timeout=250)
    assert len(made.cells) == len(notebook.cells)
    drawn = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in drawn)
