"""DyLoRA's steps in plain loops under every engine, and what is special to each: precision, parts, quantisation."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dynamic.functional.ranks import draw_rank, rank_weights
from tests.distributed.gloo import ENGINES
from tests.distributed.test_tuners import largest_difference
from tests.processes import python, together
from tests.tuners.methods import METHODS

pytest.importorskip("deepspeed")

SCRIPT = Path(__file__).with_name("loops_script.py")
LOADED = [f"loaded-{method}" for method in METHODS]
CELLS = ["accumulation", "quantised"]
# Which engine shows what, beyond what all are asked.
MORE = {
    "ddp": ["frozen-bfloat16"],
    "fsdp2": [*LOADED, "frozen-bfloat16", "reading"],
    "zero1": ["frozen-bfloat16", "overflow-float16", "no-zero-float16", "no-zero-float32"],
    "zero2": ["frozen-bfloat16", "overflow-float16"],
    "zero3": [*(cell for cell in LOADED if cell != "loaded-lamda"), "frozen-bfloat16", "overflow-float16", "reading"],
}
RANKS = [1, 2, 4, 8]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("single") / "out.pt"
    python(SCRIPT, "single", out, *CELLS, *LOADED, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return torch.load(out)


@pytest.fixture(scope="module", params=[engine for engine in ENGINES if engine != "single"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """(engine, cell -> what came out)."""
    out = tmp_path_factory.mktemp(request.param) / "out.pt"
    together(SCRIPT, request.param, out, *CELLS, *MORE[request.param])
    results = torch.load(out)
    apart = {cell: result["error"] for cell, result in results.items() if "error" in result}
    assert not apart, apart
    return request.param, results


def drawn(steps: list[int]) -> list[int]:
    """The ranks that the paper's draw gives after so many steps each."""
    return [draw_rank(tuple(RANKS), rank_weights(tuple(RANKS), "uniform", 0.5), 0, step) for step in steps]


def test_plain_loops_train_the_same_weights(found: tuple[str, dict[str, Any]], single: dict[str, Any]) -> None:
    engine, results = found
    for cell in (*CELLS, *(cell for cell in results if cell in LOADED)):
        one, two = single[cell], results[cell]
        assert largest_difference(two["states"][-1], one["states"][-1]) < 1e-5, (engine, cell)
        if cell in CELLS:
            assert two["ranks"] == one["ranks"] == drawn([0, *two["counted"][:-1]]), (engine, cell)
            assert two["counted"] == [1, 2, 3, 4, 5, 6]
        else:  # under ZeRO-3 the base model came in parts
            assert two["parted"] == (engine == "zero3"), (engine, cell)


@pytest.mark.parametrize("name", ["frozen-bfloat16", "no-zero-float32"])
def test_what_is_frozen_does_not_move(found: tuple[str, dict[str, Any]], name: str) -> None:
    """In bfloat16, whose float32 copy belongs to the engine; and where DeepSpeed has no copy."""
    engine, results = found
    if name not in results:
        assert name == "no-zero-float32"
        assert engine != "zero1"
        return
    cell = results[name]
    assert cell["ranks"] == drawn([*range(6)])  # counted once
    assert len({*cell["ranks"]}) > 1
    for rank, before, after in zip(cell["ranks"], cell["states"][:-1], cell["states"][1:], strict=True):
        below = max([0, *(each for each in RANKS if each < rank)])
        moved = 0
        for name, value in before.items():
            by_component = (value != after[name]).any(1 if "lora_A" in name else 0)
            moved += int(by_component[below:rank].sum())
            by_component[below:rank] = False
            assert not by_component.any(), (engine, rank, name)
        assert moved, (engine, rank)


def test_a_step_that_overflows_draws_no_rank(found: tuple[str, dict[str, Any]]) -> None:
    engine, results = found
    if not engine.startswith("zero"):
        return  # accelerate's GradScaler is in tests/tuners/test_rank_schedule.py
    cell = results["overflow-float16"]
    moved = [largest_difference(a, b) > 0 for a, b in zip(cell["states"][:-1], cell["states"][1:], strict=True)]
    assert not moved[0]  # at a scale of 2 ** 24
    assert moved[-1]
    applied = [sum(moved[: step + 1]) for step in range(len(moved))]
    assert cell["counted"] == applied
    assert cell["ranks"] == drawn([0, *applied[:-1]])


def test_deepspeed_without_zero(found: tuple[str, dict[str, Any]]) -> None:
    engine, results = found
    if engine != "zero1":
        return
    cell = results["no-zero-float16"]
    assert cell["ranks"] == drawn([*range(6)])
    assert cell["counted"] == [1, 2, 3, 4, 5, 6]
    assert cell["said"].startswith("update='frozen'")
    assert "zero_optimization.stage" in cell["said"]
    assert not cell["moved"]


def test_reading_parted_factors_is_refused_by_name(found: tuple[str, dict[str, Any]]) -> None:
    engine, results = found
    for what, said in results.get("reading", {"said": {}})["said"].items():
        host = "ZeRO-3" if engine == "zero3" else "FSDP2"
        assert said is not None, what
        assert said.startswith("RuntimeError"), said
        assert host in said, said
        assert "trainer.save_model" in said, said
