"""Is what was exported what was computed? Stock PEFT answers, in a process that never imports peft_dynamic."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peft_dynamic.cli._edge import UserError
from peft_dynamic.cli._load import device
from peft_dynamic.hosts.modes import evaluating

STOCK = """
import json, sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
job = json.loads(sys.argv[1])
settings = {"dtype": getattr(torch, job["dtype"])}
if job["quantization"]:
    settings["quantization_config"] = BitsAndBytesConfig.from_dict(job["quantization"])
base = AutoModelForCausalLM.from_pretrained(job["model"], **settings).to(job["device"])
model = PeftModel.from_pretrained(base, job["adapter"]).eval()
saved = load_file(job["batch"], device=job["device"])
expected = saved.pop("logits")
with torch.no_grad():
    output = model(**saved)
difference = (output.logits.float() - expected.float()).abs().max().item()
assert not [name for name in sys.modules if name.startswith("peft_dynamic")]
print("RESULT " + json.dumps({
    "equal": torch.equal(output.logits, expected),
    "difference": difference,
    "scale": expected.float().abs().max().item(),
    "loss": output.loss.item(),
    "rank": model.peft_config["default"].r,
}))
"""


def check_in_stock_peft(
    name: str,
    lora: Path,
    adapter: Path,
    model: Any,
    batch: dict[str, torch.Tensor],
    dtype: torch.dtype,
    quantization: Any,
    seconds: float | None,
) -> dict[str, Any] | None:
    """Logits of the exported adapter in stock PEFT, against ours.

    Args:
        name: the base model.
        lora: the exported adapter.
        adapter: ours, to name in an error.
        model: the model at the exported rank.
        batch: its first two rows are what is computed.
        dtype: the dtype of the base model.
        quantization: the base model's quantisation; None for none.
        seconds: how long it may take; None for as long as it takes.

    Returns:
        What the other process found; None if it took too long.

    Raises:
        UserError: stock PEFT does not load it, or computes something else.
    """
    inputs = {key: value[:2].to(device(model)) for key, value in batch.items()}
    with evaluating(model):
        logits = model(**inputs).logits
    with tempfile.TemporaryDirectory() as work:
        saved = {key: value.contiguous().cpu() for key, value in {**inputs, "logits": logits}.items()}
        save_file(saved, Path(work, "batch.safetensors"))
        task = {
            "model": name,
            "adapter": str(lora),
            "batch": str(Path(work, "batch.safetensors")),
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device(model)),
            "quantization": quantization.to_dict() if quantization else None,
        }
        command = [sys.executable, "-c", STOCK, json.dumps(task)]
        try:
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if done.returncode or line is None:
        raise UserError(f"stock PEFT could not load {lora}. This is a bug, please report it:\n{done.stderr}")
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    if not result["difference"] <= 0.05 * result["scale"]:
        raise UserError(
            f"stock PEFT computes other logits from {lora}: the greatest difference is {result['difference']:.3g}. "
            f"This is a bug, please report it. The adapter is in {adapter}."
        )
    return result
