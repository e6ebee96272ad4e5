"""What vLLM makes of a LoRA folder, restated from its loader, which does not run everywhere these tests do.

Read in https://github.com/vllm-project/vllm, in vllm/lora:

- peft_helper.py at e745bafffc44744aa601169f8c6f325e47ca7cd5, `from_dict` and `validate_legal`: the configuration
- lora_model.py at 0306474e9d1f26d8717aad457b9511f0c9e57d60, `from_local_checkpoint`: the tensors
- utils.py at 001e63a89b474b88345fd72912fe068c4ae83f41, `parse_fine_tuned_lora_name`: their names
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

NEEDED = ("r", "lora_alpha", "target_modules")
PREFIX = "base_model.model."
ENDS = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b"}


class Refused(Exception):
    """vLLM does not load the folder."""


class Update(NamedTuple):
    """What vLLM adds to a layer: scale * b @ a."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def read(folder: Path, linear: set[str], max_lora_rank: int = 16) -> dict[str, Update]:
    """The updates by the names of their modules.

    Args:
        folder: what `--lora-modules name=folder` names.
        linear: last names of the modules that vLLM's model can adapt.
        max_lora_rank: what the server was started with; 16 is its default.

    Raises:
        Refused: a check fails.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _check_config(config, max_lora_rank)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is None:
            raise Refused(f"{name} is no LoRA weight")
        module = name.removeprefix(PREFIX).removesuffix(end)
        if module.rpartition(".")[2] not in linear:
            raise Refused(f"{module} is none of {sorted(linear)}")
        parts.setdefault(module, {})[ENDS[end]] = tensor
    # its buffers are max_lora_rank wide: a factor goes into the first rows or columns
    return {module: Update(part["a"], part["b"], scale) for module, part in parts.items()}


def _check_config(config: dict, max_lora_rank: int) -> None:
    if missing := [name for name in NEEDED if name not in config]:
        raise Refused(f"the configuration has no {', '.join(missing)}")
    for name in ("modules_to_save", "use_dora"):
        if config.get(name):
            raise Refused(f"{name} is not supported")
    if config.get("bias", "none") != "none":
        raise Refused("a bias is not supported")
    if config["r"] > max_lora_rank:
        raise Refused(f"rank {config['r']} is above max_lora_rank {max_lora_rank}")
