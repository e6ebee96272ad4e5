"""Small models with each kind of layer that LoRA adapts. Imported by processes that must never import peft_dynamic.

Run as a script, it loads exported adapters with stock PEFT and writes what they compute:

    python tests/stock_cases.py FOLDER

FOLDER/<case>/ holds the adapter; FOLDER/<case>.safetensors gets the output.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.a, self.b, self.head = (
            nn.Embedding(20, 16),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
            nn.Linear(16, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch,) int64
        return self.head(torch.relu(self.b(torch.relu(self.a(self.emb(x))))))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.g2 = nn.Conv1d(4, 8, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.c3 = nn.Conv3d(4, 8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, 4, 7, 7)
        flat = self.c1(x.flatten(2)).flatten(1)
        square = self.g2(self.c2(x)).flatten(1)
        cube = self.c3(x.unsqueeze(2).repeat(1, 1, 2, 1, 1)).flatten(1)
        return torch.cat([flat, square, cube], dim=1)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.a, self.b = Conv1D(32, 16), Conv1D(5, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, 16)
        return self.b(torch.relu(self.a(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, length, 16)
        return self.head(self.attention(x, x, x)[0])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 8)), nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, 16)
        return torch.einsum("bi,eio,eoj->bj", x, self.up, self.down)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(16, 16), Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, 16)
        return self.experts(self.first(x))


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,  # at least 64, the block size of 4-bit kernels
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )


class Case(NamedTuple):
    """One model and the settings of its adapter.

    `ranks` are those to export: an int, or a dict from module names to ranks.
    """

    model: Callable[[], nn.Module]
    config: dict
    inputs: Callable[[], torch.Tensor]
    ranks: tuple = (1, 3, 8)


def tokens(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, 20, shape)


def floats(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape)


CASES = {
    "linear": Case(Mlp, {"target_modules": ["a", "b", "head"]}, tokens(6)),
    "embedding": Case(Mlp, {"target_modules": ["emb", "a"]}, tokens(6)),
    "modules_to_save": Case(Mlp, {"target_modules": ["a"], "modules_to_save": ["head"]}, tokens(6)),
    "bias": Case(Mlp, {"target_modules": ["a"], "bias": "all"}, tokens(6)),
    "lora_bias": Case(Mlp, {"target_modules": ["a", "b"], "lora_bias": True}, tokens(6)),
    "trainable_tokens": Case(Mlp, {"target_modules": ["a"], "trainable_token_indices": {"emb": [1, 2]}}, tokens(6)),
    "patterns": Case(
        Mlp,
        {"target_modules": ["a", "b", "head"], "rank_pattern": {"b": 2}, "alpha_pattern": {"head": 3}},
        tokens(6),
        (1, 3, 8, {"a": 5, "head": 2}),
    ),
    "convolutions": Case(Convolutions, {"target_modules": ["c1", "c2", "g2", "c3"]}, floats(3, 4, 7, 7), (2, 6, 8)),
    "transposed": Case(Transposed, {"target_modules": ["a", "b"], "fan_in_fan_out": True}, floats(6, 16)),
    "attention": Case(Attention, {"target_modules": ["attention", "head"]}, floats(2, 5, 16)),
    "experts": Case(
        Mixture,
        {"target_modules": ["first"], "target_parameters": ["experts.up", "experts.down"]},
        floats(6, 16),
        (1, 3, 8, {"experts": 2}),
    ),
    "llama": Case(
        tiny_llama,
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        tokens(2, 9),
        (1, 3, 8, {"q_proj": 2, "layers.1.mlp.up_proj": 5}),
    ),
}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The base model and an input, the same in every process."""
    torch.manual_seed(0)
    case = CASES[name]
    return case.model().eval(), case.inputs()


def compute(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(inputs)
    return getattr(output, "logits", output)


def main(folder: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import save_file

    for adapter in sorted(path.parent for path in folder.glob("*/adapter_config.json")):
        model, inputs = build(adapter.name.partition("-")[0])
        output = compute(PeftModel.from_pretrained(model, adapter).eval(), inputs)
        save_file({"output": output.contiguous()}, folder / f"{adapter.name}.safetensors")
    assert not [name for name in sys.modules if name.startswith("peft_dynamic")]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
