"""Two processes on gloo train what one process trains, with the same drawn exits."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from tests.processes import python, together


def launch(folder: Path, processes: int) -> dict[str, Any]:
    out = folder / f"{processes}.pt"
    script = Path(__file__).with_name("distributed_script.py")
    if processes > 1:
        together(script, out, processes=processes)
    else:
        python(script, out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("single"), 1)


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys() == {"full", "lora"}
    for what in one:
        mine, other = one[what], two[what]
        for name, p in mine["state"].items():
            torch.testing.assert_close(p, other["state"][name], rtol=1e-4, atol=1e-5)
        for first, second in zip(mine["log"], other["log"], strict=True):
            assert first.keys() == second.keys()  # and so the same exits
            assert first == pytest.approx(second, rel=1e-4)
        # in batches of any size: by labelled tokens over both processes
        assert len(mine["eval"]) == 4
        assert mine["eval"] == pytest.approx(other["eval"], rel=1e-4)
        exits = [value for key, value in mine["eval"].items() if "exit" in key]
        assert mine["eval"]["eval_loss"] == pytest.approx(sum(exits) / 3, rel=1e-5)


def test_two_processes(single: dict[str, Any], tmp_path: Path) -> None:
    exits = [sorted(key for key in entry if key.startswith("exit_")) for entry in single["full"]["log"]]
    assert all(len(keys) == 2 for keys in exits)
    assert_same(single, launch(tmp_path, 2))
