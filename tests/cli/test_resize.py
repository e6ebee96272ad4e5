"""The verbs that take finished adapters: no base model, and bad input is one message."""

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from peft_dynamic.algebra.checkpoint import read_checkpoint
from tests.cli.common import invoke, message
from tests.conformance.cases import perturb
from tests.tuners.common import tiny_llama


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    perturb(model)
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def ranks(folder: Path) -> set[int]:
    return {product.rank for product in read_checkpoint(folder).products.values()}


def test_resize_merge_and_average_write_adapters(adapter: Path, tmp_path: Path) -> None:
    result = invoke("resize", adapter, tmp_path / "small", "--rank", 2)
    assert result.exit_code == 0, result.output
    assert "has 448 of the 1,792 numbers of" in result.output
    assert ranks(tmp_path / "small") == {2}
    assert invoke("resize", adapter, tmp_path / "half", "--parameters", 0.5).exit_code == 0
    assert read_checkpoint(tmp_path / "half").size <= 896
    assert invoke("resize", adapter, tmp_path / "bytes", "--bytes", 2000).exit_code == 0
    assert read_checkpoint(tmp_path / "bytes").size <= 500
    result = invoke("merge", tmp_path / "sum", f"{adapter}=0.5", f"{tmp_path / 'small'}=0.5")
    assert "is the sum of 2 adapters" in result.output
    assert ranks(tmp_path / "sum") == {10}
    assert invoke("average", tmp_path / "mean", adapter, tmp_path / "small", "--rank", 3).exit_code == 0
    assert ranks(tmp_path / "mean") == {3}


def test_inspect_shows_the_energy_of_each_rank(adapter: Path) -> None:
    result = invoke("inspect", adapter)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("LORA, 4 modules, largest rank 8, 1,792 numbers")
    assert "layers.1.self_attn.v_proj" in result.output
    assert "100.0%" in result.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["resize", "ADAPTER", "out"], "pass one of rank, parameters and bytes"),
        (["resize", "ADAPTER", "out", "--rank", 0], "rank=0: must be a whole number of at least 1"),
        (["resize", "nowhere", "out", "--rank", 2], "is no folder and no name on the Hub"),
        (["merge", "out", "ADAPTER"], "must be ADAPTER=WEIGHT"),
        (["merge", "out", "ADAPTER=much"], "must be ADAPTER=WEIGHT"),
        (["average", "out", "nowhere"], "is no folder and no name on the Hub"),
        (["inspect", "nowhere"], "is no folder and no name on the Hub"),
    ],
)
def test_bad_input_is_one_message(words: list[object], expected: str, adapter: Path, tmp_path: Path) -> None:
    given = [str(word).replace("ADAPTER", str(adapter)) for word in words]
    given = [str(tmp_path / word) if word in ("out", "nowhere") else word for word in given]
    result = invoke(*given)
    assert result.exit_code == 2
    assert expected in message(result)
    assert not (tmp_path / "out").exists()
