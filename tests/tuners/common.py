"""A tiny causal language model with a DyLoRA adapter, and what the tests read off it."""

from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from peft_dynamic import DyLoRAConfig

VOCABULARY = 64


def tiny_llama(vocabulary: int = VOCABULARY, layers: int = 2) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def adapted(**settings: Any) -> Any:
    """A PeftModel: ranks 1, 2, 4, 8 of 8, drawn uniformly, on every linear layer unless told otherwise."""
    defaults = {"r": 8, "ranks": [1, 2, 4, 8], "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    defaults["rank_sampling"] = "uniform"
    if settings.get("update") == "frozen":
        defaults["truncation"] = "prefix"
    return get_peft_model(tiny_llama(), DyLoRAConfig(**(defaults | settings)))


def rows(number: int = 32, length: int = 10, seed: int = 3) -> torch.Tensor:
    """(number, length) token ids."""
    return torch.randint(0, VOCABULARY, (number, length), generator=torch.Generator().manual_seed(seed))


def a_layer(model: Any) -> Any:
    return next(module for module in model.modules() if hasattr(module, "lora_views"))


def schedule_of(model: Any, adapter: str = "default") -> Any:
    return a_layer(model).lora_views[adapter].schedule


class RankRecorder:
    """The width that lora_A really computed with, in each forward pass of one layer."""

    def __init__(self, model: Any) -> None:
        self.training: list[int] = []
        self.evaluation: list[int] = []
        self.factor = a_layer(model).lora_A["default"]
        self.factor.register_forward_hook(self)

    def __call__(self, module: Any, args: Any, output: torch.Tensor) -> None:
        (self.training if module.training else self.evaluation).append(output.shape[-1])


def optimizer_of(model: Any, lr: float = 1e-2, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)


def train(model: Any, steps: int, optimizer: Any = None, data: Any = None, accumulate: int = 1, first: int = 0) -> Any:
    """A plain loop with no callback; returns the optimizer."""
    optimizer = optimizer or optimizer_of(model)
    data = rows() if data is None else data
    model.train()
    for step in range(first, first + steps):
        batch = data[4 * (step % 8) : 4 * (step % 8) + 4]
        for part in batch.chunk(accumulate):
            (model(input_ids=part, labels=part).loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def trainable_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(model: Any, steps: int, lr: float, **inputs: torch.Tensor) -> list[float]:
    """Of so many steps of AdamW on the same batch."""
    optimizer, found = optimizer_of(model, lr), []
    for _ in range(steps):
        loss = model.train()(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
