"""What the density loss adds to a training step of LoRA: time and peak memory, fused and as plain autograd.

    PYTHONPATH=. python benchmarks/density_cost/run.py --models DIR [--rounds 20] [--out FILE]

DIR holds minilm and smollm2. Steps are taken in turn, in one process, since the machine is noisy: read the ratios. All
variants train the same LoRA on every linear layer, in float32. Peak memory is each variant's own process: the highest
resident size during the steps less that before the first.
"""

import argparse
import json
import platform
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.timing import batch, in_turn, peak_memory, printed_by, ratios, step, with_optimizer
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
    ids = batch(folder / name, size, length)
    return {"ids": ids, "labels": torch.arange(size) % 2} if kind == "SEQ_CLS" else {"ids": ids}


def grown(name: str, variant: str, folder: Path) -> float:
    """MiB that five steps need."""
    trained, inputs = with_optimizer(prepared(name, variant, folder)), given(name, folder)
    return peak_memory(lambda: [step(*trained, **inputs) for _ in range(5)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--parts", nargs="+", choices=["step", "peak_memory"], default=["step", "peak_memory"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(grown(*args.memory_of, args.models))
        return
    record: dict[str, Any] = {
        "what": "LoRA r=8 on all linear layers, float32; batch and tokens of each model: "
        + ", ".join(f"{name} {size} x {length}" for name, (size, length, _) in MODELS.items()),
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": args.threads},
        "versions": {name: version(name) for name in ("torch", "peft", "transformers")},
        "rounds": args.rounds,
        "models": {name: {} for name in args.only},
    }
    if len(args.parts) < 2 and args.out.exists():  # the other part is kept
        record = json.loads(args.out.read_text(encoding="utf-8"))
    if "step" in args.parts:
        record["rounds"] = args.rounds
    for name in args.only if "step" in args.parts else []:
        models = {v: with_optimizer(prepared(name, v, args.models)) for v in args.variants}
        inputs = given(name, args.models)
        times = in_turn({v: partial(step, *each, **inputs) for v, each in models.items()}, args.rounds)
        record["models"][name]["step"] = ratios(times, "lora")
        del models
    for name in args.only if "peak_memory" in args.parts else []:
        common = ("--models", str(args.models), "--threads", str(args.threads), "--memory-of", name)
        found = {v: printed_by(__file__, *common, v) for v in args.variants}
        record["models"][name]["peak_memory"] = {
            v: {"mib": mib, "ratio": mib / found["lora"]} for v, mib in found.items()
        }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, result in record["models"].items():
        for v in args.variants:
            taken = result.get("step", {}).get(v, {}).get("ratio_median", float("nan"))
            memory = result.get("peak_memory", {}).get(v, {}).get("ratio", float("nan"))
            print(f"| {name} | {v} | step {taken:.3f} | peak memory {memory:.3f} |")


if __name__ == "__main__":
    main()
