"""Two processes of accelerate's launcher and of torch's own FSDP: the same ranks and adapters as one process.

Every tuner under every engine is in tests/distributed.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict

from peft_dynamic import DyLoRAConfig, MoSLoRAConfig
from tests.processes import ROOT, free_port, python, together
from tests.stock_cases import build

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


SCRIPT = Path(__file__).with_name("distributed_script.py")
METHOD = "dylora"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("single") / "out.pt"
    python(SCRIPT, "single", out, METHOD, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return torch.load(out)


def assert_equal(results: dict[str, Any], single: dict[str, Any]) -> None:
    for method, result in results.items():
        assert result["processes"] == 2
        assert result["ranks"] == single[method]["ranks"]
        assert result["state"].keys() == single[method]["state"].keys()
        for name, value in single[method]["state"].items():
            # the mean over two halves of a batch is rounded otherwise, and Adam divides small gradients by themselves
            assert torch.allclose(result["state"][name], value, atol=2e-4), (method, name)


def test_fully_shard_equals_one_process(tmp_path: Path, single: dict[str, Any]) -> None:
    together(SCRIPT, "fsdp2", tmp_path / "out.pt", METHOD)
    results = torch.load(tmp_path / "out.pt")
    assert [*results] == [METHOD]
    assert_equal(results, single)


def test_two_processes_of_accelerates_launcher_equal_one(tmp_path: Path, single: dict[str, Any]) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "out.pt"
    config.write_text(ACCELERATE_CONFIG.format(port=free_port()))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [*launcher, SCRIPT, "ddp", out, METHOD]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(out)
    assert [*results] == [METHOD]
    assert_equal(results, single)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("method", ["dylora", "dylora-mixer", "moslora"])
def test_fsdp1_trains_what_is_stored(method: str) -> None:
    """FSDP1 with use_orig_params asks for each parameter by name; a part of a factor or M A is none of them."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def trained(wrap: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        base, inputs = build("linear")
        settings = {"r": 8, "target_modules": ["a", "b"], "init_lora_weights": False}
        if method == "moslora":
            config = MoSLoRAConfig(**settings)
        else:
            config = DyLoRAConfig(ranks=[2, 8], use_mixer=method == "dylora-mixer", **settings)
        model = get_peft_model(base, config)
        if method != "moslora":
            model.set_rank(2)
        wrapped = (
            FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")) if wrap else model
        )
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for _ in range(6):
            wrapped.train()(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return get_peft_model_state_dict(model)

    expected = trained(wrap=False)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        found = trained(wrap=True)
    finally:
        torch.distributed.destroy_process_group()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name
