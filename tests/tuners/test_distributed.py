"""Two processes on gloo: the same ranks everywhere, and the same adapter as one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ACCELERATE_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU  # the name of accelerate's two-process launcher; use_cpu makes it gloo on CPUs
use_cpu: true
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: 'no'
main_process_port: {port}
"""


def free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(kind: str, update: str, out: Path) -> None:
    script = [str(ROOT / "tests/tuners/distributed_script.py"), kind, update, str(out)]
    if kind == "single":
        command = [sys.executable, *script]
    elif kind == "ddp":
        config = out.with_suffix(".yaml")
        config.write_text(ACCELERATE_CONFIG.format(port=free_port()))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *script]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
        command += script
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("update", ["nested", "frozen"])
def test_ddp_and_fsdp2_equal_one_process(tmp_path: Path, update: str) -> None:
    results = {}
    for kind in ("single", "ddp", "fsdp2"):
        launch(kind, update, tmp_path / f"{kind}.pt")
        results[kind] = torch.load(tmp_path / f"{kind}.pt")
    for kind in ("ddp", "fsdp2"):
        assert results[kind]["processes"] == 2
        assert results[kind]["ranks"] == results["single"]["ranks"]
        assert results[kind]["state"].keys() == results["single"]["state"].keys()
        for name, value in results["single"]["state"].items():
            # the mean over two halves of a batch is rounded otherwise, and Adam divides small gradients by themselves
            assert torch.allclose(results[kind]["state"][name], value, atol=2e-4), (kind, name)
