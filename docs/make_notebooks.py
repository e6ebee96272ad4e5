"""Runs the notebooks of docs/notebooks on real models and data, and keeps their outputs.

    OMP_NUM_THREADS=1 python docs/make_notebooks.py --models MODELS --data DATA [NAME ...]

MODELS is the folder that `peft-dynamic models smollm2 minilm t5` fills. DATA has sst2/train.jsonl and
validation.jsonl as on the Hub, and squad_xquad_en with the rows of XQuAD. A notebook without its parameters changed
takes the same from the Hub. Nothing of this machine stays in the outputs: no path, no progress bar, no warning.
"""

import argparse
import copy
import json
import os
import re
import resource
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
LOGGED = re.compile(r"^\[[\d :,-]+\] \[[A-Z]+\] .*\n", re.M)  # what a library logs to the standard output
# What is set in place of the parameters' names on the Hub: folders of --models and --data.
REAL = {
    "rank-of-a-lora": {"MODEL": "models/minilm", "DATA": "data/sst2"},
    "pick-a-rank": {"MODEL": "models/smollm2"},
    "exit-early": {"MODEL": "models/smollm2"},
    "few-neurons": {"MODEL": "models/minilm", "DATA": "data/sst2"},
    "rewards": {},
    "cite": {"MODEL": "models/t5", "DATA": "data/squad"},
    "merging": {"MODEL": "models/smollm2", "DATA": "data/sst2"},
}


def executed(notebook: Any, parameters: Mapping[str, Any], folder: Path, **client: Any) -> Any:
    """A copy of a notebook, run from top to bottom in a folder, with other values after its cell of parameters."""
    made = copy.deepcopy(notebook)
    tagged = [i for i, cell in enumerate(made.cells) if "parameters" in cell.metadata.get("tags", [])]
    (place,) = tagged
    given = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
    made.cells.insert(place + 1, given)
    NotebookClient(made, resources={"metadata": {"path": str(folder)}}, **client).execute()
    del made.cells[place + 1]
    return made


def kept(output: Any) -> bool:
    """Whether an output is no warning and no progress bar, which is all that these notebooks have as HTML."""
    return output.get("name") != "stderr" and "text/html" not in output.get("data", {})


def cleaned(notebook: Any) -> Any:
    """What is kept of a run: outputs in the order of their cells, and nothing about when and where."""
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.metadata.pop("execution", None)
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = number
            if "text" in output:
                output["text"] = LOGGED.sub("", output["text"])
        found, cell.outputs = cell.outputs, []
        for output in filter(kept, found):
            last = cell.outputs[-1] if cell.outputs else {}
            if "text" in output and "text" in last:  # what came between them is left out
                last["text"] += output["text"]
            elif output.get("text") != "":
                cell.outputs.append(output)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def squad(source: Path, target: Path) -> None:
    """The rows of XQuAD in the form that SQuAD has on the Hub."""
    target.mkdir(parents=True)
    for split in ("train", "validation"):
        with (target / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for line in (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                row["answers"] = {"text": row["answers"], "answer_start": row.pop("answer_start")}
                file.write(json.dumps(row) + "\n")


def main(names: list[str], models: Path, data: Path) -> None:
    """Run and write the notebooks that are named."""
    os.environ |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for name in names:
        path = FOLDER / f"{name}.ipynb"
        with tempfile.TemporaryDirectory() as work:
            squad(data / "squad_xquad_en", Path(work, "data", "squad"))
            for place in {value for value in REAL[name].values() if value.startswith("data/")} - {"data/squad"}:
                Path(work, place).symlink_to(data.resolve() / Path(place).name)
            Path(work, "models").symlink_to(models.resolve())
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            found = cleaned(executed(nbformat.read(path, as_version=4), REAL[name], Path(work), timeout=3000))
            seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
            text = nbformat.writes(found)
            for place in (work, str(models.resolve()), str(data.resolve()), str(ROOT), str(Path.home())):
                if re.search(re.escape(place) + r"(?=[/\"\s\\])", text):
                    raise SystemExit(f"{path}: {place} is in its outputs")
        path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        print(f"{name}: {seconds:.0f} CPU seconds, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(REAL)}; all without any")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    main(given.names or [*REAL], given.models, given.data)
