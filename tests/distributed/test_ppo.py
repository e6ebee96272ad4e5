"""PPO under FSDP2 and DeepSpeed: two processes roll out, train, measure, save and resume what one process does."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_dynamic.trainers.ppo.sharding import check_engine
from tests.distributed.test_tuners import largest_difference
from tests.processes import python, together

pytest.importorskip("deepspeed")

SCRIPT = Path(__file__).with_name("ppo_script.py")
KINDS = ["lora", "dylora", "full", "lora-head"]
# DDP has more tests, in tests/trainers/ppo. ZeRO-1 differs from ZeRO-2 in what it keeps of the gradients.
OF_ENGINE = {
    "ddp": ["dylora", "full", "lora-head"],
    "fsdp2": KINDS,
    "zero1": ["dylora", "full"],
    "zero2": KINDS,
    "zero3": ["loaded", "dylora", "full", "lora-head"],
}
REFUSED: dict[str, dict[str, str]] = {
    "ddp": {},
    "zero1": {},
    "fsdp2": {"nan": "FloatingPointError: The loss of step 1 is nan"},
    "zero2": {"nan": "FloatingPointError: A gradient of step 1", "target_kl": "target_kl=0.1 skips steps"},
    "zero3": {
        "nan": "FloatingPointError: A gradient of step 1",
        "value_model": "value_model: a model of its own for the values was not tried under DeepSpeed",
        "virtual": "An adapter with virtual tokens",
    },
}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("single") / "out.pt"
    python(SCRIPT, "single", out, *KINDS, "loaded", env=os.environ | {"OMP_NUM_THREADS": "1"})
    return torch.load(out)


@pytest.mark.parametrize("engine", OF_ENGINE)
def test_two_processes_do_what_one_does(tmp_path: Path, single: dict[str, Any], engine: str) -> None:
    together(SCRIPT, engine, tmp_path / "out.pt", *OF_ENGINE[engine], *REFUSED[engine])
    results = torch.load(tmp_path / "out.pt")
    apart = {kind: found["error"] for kind, found in results.items() if "error" in found}
    assert not apart, apart
    for kind in OF_ENGINE[engine]:
        found = results[kind]
        for part in ("whole", "resumed"):
            one, two, cell = single[kind][part], found[part], (engine, kind, part)
            assert two["type"] == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(engine, "DEEPSPEED"), cell
            assert largest_difference(two["saved"], one["saved"]) < 1e-5, cell
            assert [entry.keys() for entry in two["logs"]] == [entry.keys() for entry in one["logs"]], cell
            for mine, theirs in zip(two["logs"], one["logs"], strict=True):
                # explained_variance is 1 less a ratio of two variances, and may be -70
                assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-4), cell
        assert largest_difference(found["resumed"]["saved"], found["whole"]["saved"]) == 0, (engine, kind)
    for kind, words in REFUSED[engine].items():
        assert results[kind]["said"] is not None, kind
        assert words in results[kind]["said"], kind
        assert not results[kind]["moved"], kind


def test_fsdp1_is_refused() -> None:
    """By the accelerator's word, since accelerate starts no FSDP1 on a CPU."""
    trainer = SimpleNamespace(
        is_fsdp_enabled=True, is_deepspeed_enabled=False, accelerator=SimpleNamespace(is_fsdp2=False)
    )
    with pytest.raises(ValueError, match=r"FSDP1 puts flat buffers .* Set fsdp_version: 2"):
        check_engine(trainer, None)


def test_the_cells_train_all_of_the_policy_and_its_values(single: dict[str, Any]) -> None:
    """Else the test above would compare nothing."""
    for kind, found in single.items():
        saved = found["whole"]["saved"]
        assert "head.weight" in saved  # the value function's
        assert not torch.equal(saved["head.weight"][0], torch.linspace(-1, 1, 32)), kind
    assert any("lm_head" in name for name in single["lora-head"]["whole"]["saved"])
    lengths = [e["completions/min_length"] for e in single["lora"]["whole"]["logs"] if "completions/min_length" in e]
    assert len({*lengths}) > 1  # some processes end before others
