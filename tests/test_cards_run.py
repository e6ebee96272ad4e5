"""The Python on an adapter's page is run as it stands, in a process of its own: it gives the pushed adapter."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForSequenceClassification

from peft_dynamic import DyLoRAConfig, at_rank
from peft_dynamic.hub import push_adapter
from tests import hub_server, methods
from tests.conformance.cases import perturb
from tests.hub_server import Hub
from tests.processes import ROOT, python
from tests.stock_cases import build, compute

hub = hub_server.hub  # fixture
pytestmark = pytest.mark.filterwarnings(hub_server.HOSTS_WARNING)

# What the page's names mean: `me/poet` and `me/base` are folders where it runs, and the network is off
RUN = """
import sys
block = open("block.py").read()
exec(compile(block, "block.py", "exec"))
assert any(name.startswith("peft_dynamic") for name in sys.modules) == ("import peft_dynamic" in block)
import torch
from safetensors.torch import save_file
from tests.stock_cases import build, compute
save_file({"logits": compute(model.eval(), build("llama")[1]).contiguous()}, "seen")
"""
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"^# (peft_dynamic\.export_lora\(.*\)) writes", re.MULTILINE)
SETTINGS: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
RANKED = SETTINGS | {"ranks": [1, 2, 4, 8]}


def classifier() -> nn.Module:
    config = build("llama")[0].config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def causal() -> nn.Module:
    return build("llama")[0]


# base, configuration, push, each block's rank; None for all that the adapter is
CASES: dict[str, tuple[Any, Any, dict[str, Any], list[int | None]]] = {
    "dylora": (causal, DyLoRAConfig(**RANKED), {"ranks": [2, 4]}, [8, 4]),
    "dylora-below-a-lora": (causal, DyLoRAConfig(**RANKED), {"ranks": [], "lora_rank": 2}, [2, 8]),
    "lora": (causal, LoraConfig(**SETTINGS), {"ranks": [4]}, [8, 4]),
    "no-task": (causal, DyLoRAConfig(**RANKED | {"task_type": None}), {"ranks": []}, [8]),
    "classifier": (classifier, DyLoRAConfig(**RANKED | {"task_type": "SEQ_CLS"}), {"ranks": [2]}, [8, 2]),
}
for name, make in methods.configs(sources=causal, task_type="CAUSAL_LM").items():
    twins = [4] if methods.method_of(name).engines else []  # of a LoRA with something more the rank that is all of it
    CASES[f"all-{name}"] = (causal, make, {"ranks": twins}, [None] * (1 + len(twins)))


def run(code: str, folder: Path) -> torch.Tensor:
    (folder / "block.py").write_text(code, encoding="utf-8")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    python("-c", RUN, cwd=folder, env=variables)
    return load_file(folder / "seen")["logits"]


@pytest.mark.parametrize("case", CASES)
def test_the_python_of_a_card_gives_the_adapter(hub: Hub, tmp_path: Path, case: str) -> None:
    base, config, settings, ranks = CASES[case]
    base().save_pretrained(tmp_path / "me" / "base")
    model = get_peft_model(base(), config() if callable(config) else copy.deepcopy(config))
    perturb(model)
    model.eval()
    push_adapter(model, "me/poet", base_model="me/base", **settings)
    for name, content in hub.files("me/poet").items():
        path = tmp_path / "me" / "poet" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    card = (tmp_path / "me" / "poet" / "README.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(card)
    assert len(blocks) == len(ranks)
    for block, rank in zip(blocks, ranks, strict=True):
        expected = logits_at(model, rank)
        torch.testing.assert_close(run(block, tmp_path), expected, rtol=1e-5, atol=1e-6)
        if comment := COMMENT.search(block):  # what it says of an export holds too
            stock = 'model = __import__("peft").PeftModel.from_pretrained(base, "lora")'
            code = f"{block}\n{comment[1]}\nmodel.unload()\n{stock}\n"
            torch.testing.assert_close(run(code, tmp_path), expected, rtol=1e-5, atol=1e-6)


def logits_at(model: Any, rank: int | None) -> torch.Tensor:
    """The logits at a rank; of a stock LoRA the smaller rank is the best one, which `set_rank` gives."""
    if rank is None:
        return compute(model, build("llama")[1])
    with at_rank(model, rank):
        return compute(model, build("llama")[1])
