"""Resizing without a base model: seconds and memory on an adapter of SmolLM2's shape and on one of a 7B model's.

The adapters hold random numbers: what is measured is time and memory, which do not depend on them.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.study import Cell, Context
from benchmarks.summary import table

# in, out of the adapted linear layers of a block
SMOLLM2 = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
LLAMA_7B = [(4096, 4096)] * 4 + [(4096, 11008), (4096, 11008), (11008, 4096)]
SHAPES = {"smollm2": (SMOLLM2, 30, 32), "7b": (LLAMA_7B, 32, 64), "tiny": (SMOLLM2[:2], 2, 8)}
BUDGETS: dict[str, dict[str, Any]] = {"rank": {"rank": 8}, "parameters": {"parameters": 0.25}}


def write(folder: Path, shape: str, dtype: torch.dtype) -> None:
    """A LoRA adapter with random numbers."""
    from peft import LoraConfig

    layers, blocks, rank = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for block in range(blocks):
        for number, (inputs, outputs) in enumerate(layers):
            name = f"base_model.model.model.layers.{block}.linear_{number}"
            for end, size in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
                tensors[f"{name}.{end}.weight"] = torch.randn(size, generator=generator).to(dtype)
    names = [f"linear_{number}" for number in range(len(layers))]
    LoraConfig(r=rank, target_modules=names, task_type="CAUSAL_LM").save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def in_this_process(folder: str, out: str, budget: str) -> None:
    """Print the seconds of the call, and the MiB of this whole process at its largest."""
    from peft_dynamic import resize_adapter

    start = time.perf_counter()
    resize_adapter(folder, out, **BUDGETS[budget])
    seconds = time.perf_counter() - start
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def run(cell: Cell, context: Context) -> dict[str, Any]:
    shape = cell["shape"]
    taken: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as work:
        write(Path(work, "whole"), shape, torch.bfloat16 if shape == "7b" else torch.float32)
        code = "import sys; from benchmarks.resize.run import in_this_process; in_this_process(*sys.argv[1:])"
        for number in range(int(context.settings["rounds"])):
            words = [sys.executable, "-c", code, f"{work}/whole", f"{work}/out{number}", cell["budget"]]
            printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
            taken.append((float(printed[-2]), float(printed[-1])))
    seconds = sorted(each[0] for each in taken)
    return {
        f"{shape}, {cell['budget']}": {
            "seconds_median": seconds[len(seconds) // 2],
            "seconds": [seconds[0], seconds[-1]],
            "mib": max(each[1] for each in taken),
        }
    }


def report(record: dict[str, Any], context: Context) -> str:
    lines = []
    for name, found in record.items():
        if name != "conditions":
            median, (least, most), mib = found["seconds_median"], found["seconds"], found["mib"]
            lines.append([name, f"{median:.2f}", f"{least:.2f} to {most:.2f}", f"{mib:.0f}"])
    return table(["adapter, budget", "seconds, median", "least and most", "MiB of the process"], lines)
