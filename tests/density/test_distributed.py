"""Two gloo processes have the gradients of one process with the whole batch."""

from pathlib import Path

import pytest
import torch

from tests.density.models import assert_same, batch_for, reference, with_lora
from tests.density.test_trainers import whole_batch
from tests.processes import together


def test_two_processes(tmp_path: Path) -> None:
    together(Path(__file__).with_name("distributed_script.py"), tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt")
    assert found["processes"] == 2
    assert_same(found["bare"], reference(with_lora("Bert"), "Bert", batch_for("Bert")))
    wanted, _, value = whole_batch(with_lora("Llama"), "Llama", batch_for("Llama"))
    assert_same(found["trainer"], wanted)
    assert found["log"] == [pytest.approx(value, rel=1e-4)]
