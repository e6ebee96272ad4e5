"""`--json` and `--dry-run`: one object on stdout that says what is in the files, and nothing written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_dynamic.algebra.checkpoint import read_checkpoint
from peft_dynamic.cli import _curve
from peft_dynamic.cli import models as models_module
from tests.cli import common
from tests.cli.common import ROWS, invoke, message, write
from tests.conformance.cases import perturb

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    perturb(model)
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def answer(*words: object, code: int = 0) -> dict[str, Any]:
    """The object that a call prints, and nothing else."""
    result = invoke(*words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def calls(adapter: Path, out: object) -> dict[str, list[object]]:
    return {
        "resize": ["resize", adapter, out, "--rank", 1],
        "merge": ["merge", out, f"{adapter}=0.5", "--rank", 3],
        "average": ["average", out, adapter, f"{adapter}/"],
    }


@pytest.mark.parametrize("verb", ["resize", "merge", "average"])
def test_what_is_written_is_told(adapter: Path, tmp_path: Path, verb: str) -> None:
    out = tmp_path / "out"
    words = calls(adapter, out)[verb]
    dry = answer(*words, "--dry-run")
    assert not dry.pop("written")
    assert not out.exists()
    told = invoke(*words, "--dry-run")
    assert told.exit_code == 0
    assert not out.exists()
    found = answer(*words)
    assert found.pop("written")
    assert found == dry
    files = {path.name: path.stat().st_size for path in out.iterdir()}
    assert found["files"] == files
    assert found["bytes"] == sum(files.values())
    read = read_checkpoint(out)
    assert found["parameters"] == read.size
    assert found["ranks"] == {
        module.removeprefix("base_model.model."): product.rank for module, product in read.products.items()
    }
    assert set(found["ranks"].values()) == {"resize": {1}, "merge": {3, 2}, "average": {4, 2}}[verb]
    said = " ".join(told.output.split())
    assert (
        f"Nothing is written. {out} would have {read.size:,} numbers: README.md ({files['README.md']:,} bytes)" in said
    )
    assert f"rank {found['ranks']['model.layers.1.self_attn.v_proj']} model.layers.1.self_attn.v_proj" in said


@pytest.mark.parametrize("verb", ["resize", "merge", "average"])
def test_a_dry_run_refuses_what_a_run_refuses(adapter: Path, verb: str) -> None:
    for out, expected in [(adapter, "is an adapter that is read"), (adapter / "README.md", "is a file; pass a folder")]:
        result = invoke(*calls(adapter, out)[verb], "--dry-run", "--json")
        assert result.exit_code == 2
        assert expected in message(result)
        assert result.stdout == ""


def test_inspect_and_models(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer("inspect", adapter)["largest_rank"] == 4
    monkeypatch.setattr(
        models_module, "fetch", lambda name, source, say: say(f"Fetching {name}") or Path("there", name)
    )
    assert answer("models", "smollm2", "t5") == {"smollm2": str(Path("there/smollm2")), "t5": str(Path("there/t5"))}

    def fail(*_: object) -> None:
        raise models_module.FetchError("no network")

    monkeypatch.setattr(models_module, "fetch", fail)
    result = invoke("models", "t5", "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "Error: no network\n")


def test_measure(tiny: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dynamic.cli._load.fast_dtype", lambda: torch.float32)  # whatever is fast here
    data = write(tmp_path / "data.jsonl", ROWS)
    words = ["measure", adapter, "--data", data, "--ranks", 2, "--budgets", 0.5]
    found = answer(*words)
    assert [row["setting"] for row in found["rows"]] == ["base model", "rank 2", "budget 0.5"]
    assert found["rows"][1]["rank"] == 2
    assert found["rows"][2]["budget"] == 0.5
    assert set(found["rows"][0]["metrics"]) == {"loss", "perplexity"}
    assert all(row["seconds"] >= 0 and "samples" not in row for row in found["rows"])
    assert (found["adapter"], found["base_model"], found["missing"]) == (str(adapter), str(tiny), [])
    monkeypatch.setattr(_curve, "choice", lambda curve, metric, tolerance: (curve.rows[1], f"by {metric}"))
    found = answer(*words)
    assert (found["recommended"], found["why"]) == ("rank 2", "by loss")
    assert found["command"] == f"peft-dynamic resize {adapter} OUT --rank 2"
    monkeypatch.setattr(_curve._Measuring, "expected", lambda self: 1e6)
    unfinished = answer(*words, "--minutes", 1, code=3)
    assert unfinished["missing"] == ["base model", "rank 2", "budget 0.5"]
    assert unfinished["rows"] == []
