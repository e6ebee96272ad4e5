"""What MoSLoRA and LoRETTA cost beside PEFT's LoRA of r=8: step time, peak memory and inference.

One model is SmolLM2-135M-Instruct, the other RoBERTa of RobertaConfig's default size, with random weights. Beside each
LoRETTA there is one that contracts its tensor trains as its authors do: all cores to the whole tensor, one after
another, then one product. Times are taken in turn, in one process; peak memory is each variant's own process.
"""

import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, RobertaConfig, RobertaForSequenceClassification

from benchmarks.adapter_quality.run import adapted
from benchmarks.study import Cell, Context, load
from benchmarks.summary import table
from benchmarks.timing import batch, in_turn, memory_of, peak_memory, ratios, shown_ratio, step, with_optimizer

BATCH, LENGTH = 4, 64
# Modules that LoRA's kind adapts, those that an adapter follows, the dense layer of the head, and the task type.
MODELS = {
    "smollm2": (("q_proj", "v_proj"), ("self_attn.o_proj", "mlp.down_proj"), None, "CAUSAL_LM"),
    "roberta-base": (("query", "value"), ("output.dense",), "classifier.dense", "SEQ_CLS"),
}


def shape_of(size: int, largest: int = 12) -> list[int]:
    """Balanced factors, as few as there are with none above `largest`, the greatest in the middle.

    For 768 to 8, 64 and 768 that is the authors' table.
    """
    primes, rest, prime = [], size, 2
    while rest > 1:
        while rest % prime:
            prime += 1
        primes.append(prime)
        rest //= prime
    count = math.ceil(math.log(size, largest))
    while True:
        factors = [1] * count
        for prime in reversed(primes):
            factors[factors.index(min(factors))] *= prime
        if max(factors) <= max(largest, primes[-1]):
            factors.sort()
            return factors[::2] + factors[1::2][::-1]
        count += 1


class TensorTrain(nn.Module):
    """The authors' layer: contracts the cores to the (inputs, outputs) matrix in every forward pass."""

    def __init__(self, inputs: int, outputs: int, rank: int = 5, bias: bool = True) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        shape = shape_of(inputs * outputs)
        ranks = [1, *[rank] * (len(shape) - 1), 1]
        deviation = (1 / (inputs + outputs)) ** (0.5 / len(shape))
        self.cores = nn.ParameterList(
            torch.randn(before, factor, after) * deviation / after**0.5
            for before, factor, after in zip(ranks, shape, ranks[1:], strict=False)
        )
        limit = outputs**-0.5
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-limit, limit)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.cores[0]
        for core in self.cores[1:]:
            whole = torch.tensordot(whole, core, dims=([-1], [0]))
        y = x @ whole.reshape(self.inputs, self.outputs)
        return y if self.bias is None else y + self.bias


class Rep(nn.Module):
    """A linear layer with a reparameterised update of tensor trains."""

    def __init__(self, base: nn.Linear, bottleneck: int = 8, alpha: float = 16) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / bottleneck
        self.down = TensorTrain(base.in_features, bottleneck, bias=False)
        self.up = TensorTrain(bottleneck, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


class Adp(nn.Module):
    """A linear layer with a bottleneck adapter of tensor trains after it."""

    def __init__(self, base: nn.Linear, bottleneck: int = 64) -> None:
        super().__init__()
        self.base = base
        self.down = TensorTrain(base.out_features, bottleneck)
        self.up = TensorTrain(bottleneck, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return y + self.up(torch.relu(self.down(y)))


def replaced(model: nn.Module, ends: tuple[str, ...], make: Callable[[nn.Linear], nn.Module]) -> None:
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(ends)]
    if not found:
        raise ValueError(f"no linear layer ends in {ends}")
    for name in found:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, make(getattr(owner, child)))


def as_authors(model: nn.Module, kind: str, name: str) -> nn.Module:
    """With layer norms, the tensor trains, the tensorised layer of the head and the rest of the head trained."""
    targets, followed, dense, _ = MODELS[name]
    model.requires_grad_(False)
    for module_name, module in model.named_modules():
        if "norm" in module_name.lower() or "classifier" in module_name:
            module.requires_grad_(True)
    replaced(model, *{"rep": (targets, Rep), "adp": (followed, Adp)}[kind])
    if dense:
        replaced(model, (dense,), lambda linear: TensorTrain(linear.in_features, linear.out_features))
    return model


def base_model(name: str, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    if name == "smollm2":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return RobertaForSequenceClassification(RobertaConfig(num_labels=2))


def prepared(name: str, variant: str, folder: Path) -> nn.Module:
    base = base_model(name, folder)
    method, *authors = variant.split()
    if authors:
        return as_authors(base, method.removeprefix("loretta-"), name)
    targets, *_, task_type = MODELS[name]
    return adapted(base, task_type, load("adapter_quality").settings["methods"][method], list(targets))


def inputs(name: str, folder: Path) -> dict[str, torch.Tensor]:
    if name == "smollm2":
        return {"ids": batch(folder, BATCH, LENGTH)}
    rng = random.Random(0)
    ids = torch.tensor([[rng.randrange(5, 50265) for _ in range(LENGTH)] for _ in range(BATCH)])
    return {"ids": ids, "labels": torch.tensor([0, 1] * (BATCH // 2))}


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """Over LoRA's, and of LoRETTA over its authors' way as well."""
    result = ratios(times, "lora")
    for method in times:
        if (other := f"{method} authors") in times:
            result[method]["over_authors"] = ratios(times, other)[method]
    return result


def measured(name: str, variants: list[str], folder: Path, rounds: int) -> dict[str, Any]:
    """Training steps in turn, and then forward passes without gradients, of the batch and of one token."""
    models = {variant: with_optimizer(prepared(name, variant, folder)) for variant in variants}
    given = inputs(name, folder)
    trainable = {
        variant: sum(p.numel() for p in model.parameters() if p.requires_grad) for variant, (model, _) in models.items()
    }
    steps = in_turn({variant: partial(step, *each, **given) for variant, each in models.items()}, rounds)
    result = {"trainable": trainable, "training_step": compared(steps)}
    for model, _ in models.values():
        model.eval()
    for what, ids in (("forward", given["ids"]), ("one token", given["ids"][:1, :1])):
        with torch.no_grad():
            calls = {variant: partial(model, input_ids=ids) for variant, (model, _) in models.items()}
            result[what] = compared(in_turn(calls, rounds))
    return result


def grown(variant: str, name: str, folder: Path) -> float:
    """MiB that five steps need."""
    trained, given = with_optimizer(prepared(name, variant, folder)), inputs(name, folder)
    return peak_memory(lambda: [step(*trained, **given) for _ in range(5)])


def run(cell: Cell, context: Context) -> dict[str, Any]:
    name, variants, folder = cell["model"], context.settings["variants"], context.paths["models"] / "smollm2"
    if "lora" not in variants:
        raise SystemExit("the ratios need lora among the variants")
    if cell["part"] == "memory":
        return {"models": {name: {"peak_memory_mib": memory_of(grown, variants, "lora", name, folder)}}}
    return {"models": {name: measured(name, variants, folder, context.settings["rounds"])}}


def report(record: dict[str, Any], context: Context) -> str:
    tables = []
    for name, result in record["models"].items():
        lines = []
        for variant, mib in (result.get("trainable") or result["peak_memory_mib"]).items():
            timed = [result.get(what, {}).get(variant) for what in ("training_step", "forward", "one token")]
            size = f"{mib:,}" if "trainable" in result else ""
            memory = shown_ratio(result.get("peak_memory_mib", {}).get(variant), "ratio")
            authors = shown_ratio((timed[0] or {}).get("over_authors"))
            lines.append([variant, size, *map(shown_ratio, timed), memory, authors])
        header = [name, "trainable", "step", "forward", "one token", "peak memory", "step over the authors'"]
        tables.append(table(header, lines))
    return "\n\n".join(tables)
