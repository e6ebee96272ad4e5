"""What the density loss adds to a training step of LoRA: time and peak memory, fused and as plain autograd.

Steps are taken in turn, in one process. All variants train the same LoRA on every linear layer, in float32. Peak memory
is each variant's own process.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks import timing
from benchmarks.study import Cell, Context
from benchmarks.summary import table
from peft_dynamic import ActivationDensityLoss

# Model -> batch size, tokens, what LoRA adapts
MODELS = {"minilm": (16, 64, "SEQ_CLS"), "smollm2": (2, 128, "CAUSAL_LM")}
VARIANTS = ["lora", "density", "autograd"]


class ByAutograd:
    """The same term written with torch's own operations: what it would cost without a backward pass of its own."""

    def __init__(self, model: Any, eps: float = 1e-7) -> None:
        from peft_dynamic.density.structure import find_activations

        self.densities: list[torch.Tensor] = []
        self.eps = eps
        for layer in find_activations(model, None):
            layer.module.register_forward_hook(self.add)
        model.base_model.model.register_forward_hook(self.finish)

    def add(self, module: Any, args: Any, a: torch.Tensor) -> None:
        self.densities.append((a**2 / (a**2 + self.eps)).mean())

    def finish(self, module: Any, args: Any, output: Any) -> None:
        output["loss"] = output["loss"] + torch.stack(self.densities).mean()
        self.densities.clear()


def prepared(name: str, variant: str, folder: Path) -> Any:
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if MODELS[name][2] == "SEQ_CLS" else AutoModelForCausalLM
    base = auto.from_pretrained(folder / name, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=MODELS[name][2])
    model = get_peft_model(base, config)
    if variant == "density":
        ActivationDensityLoss().attach(model)
    elif variant == "autograd":
        ByAutograd(model)
    return model


def given(name: str, folder: Path) -> dict[str, torch.Tensor]:
    size, length, kind = MODELS[name]
    ids = timing.batch(folder / name, size, length)
    return {"ids": ids, "labels": torch.arange(size) % 2} if kind == "SEQ_CLS" else {"ids": ids}


def grown(variant: str, name: str, folder: Path) -> float:
    """MiB that five steps need."""
    trained, inputs = timing.with_optimizer(prepared(name, variant, folder)), given(name, folder)
    return timing.peak_memory(lambda: [timing.step(*trained, **inputs) for _ in range(5)])


def run(cell: Cell, context: Context) -> dict[str, Any]:
    name, folder = cell["model"], context.paths["models"]
    if cell["part"] == "peak_memory":
        return {"models": {name: {"peak_memory": timing.memory_of(grown, VARIANTS, "lora", name, folder)}}}
    models = {variant: timing.with_optimizer(prepared(name, variant, folder)) for variant in VARIANTS}
    inputs = given(name, folder)
    times = timing.in_turn(
        {v: partial(timing.step, *each, **inputs) for v, each in models.items()}, context.settings["rounds"]
    )
    return {"models": {name: {"step": timing.ratios(times, "lora")}}}


def report(record: dict[str, Any], context: Context) -> str:
    lines = []
    for name, result in record["models"].items():
        for variant in VARIANTS[1:]:
            taken = result.get("step", {}).get(variant)
            memory = timing.shown_ratio(result.get("peak_memory", {}).get(variant), "ratio")
            lines.append([f"{name}, {variant}", timing.shown_ratio(taken), timing.shown_quartiles(taken), memory])
    return table(["over LoRA alone", "step", "quartiles", "peak memory"], lines)
