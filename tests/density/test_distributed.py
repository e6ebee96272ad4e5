"""Two gloo processes have the gradients of one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.density.models import assert_same, batch_for, reference, with_lora
from tests.density.test_trainers import whole_batch
from tests.tuners.test_distributed import free_port

ROOT = Path(__file__).parents[2]


def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command += [str(ROOT / "tests/density/distributed_script.py"), str(tmp_path / "out.pt")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    assert found["processes"] == 2
    assert_same(found["bare"], reference(with_lora("Bert"), "Bert", batch_for("Bert")))
    wanted, _, value = whole_batch(with_lora("Llama"), "Llama", batch_for("Llama"))
    assert_same(found["trainer"], wanted)
    assert found["log"] == [pytest.approx(value, rel=1e-4)]
