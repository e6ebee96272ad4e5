"""DyLoRA in a bare PyTorch loop, on a model made on the spot: train once, look at every rank, export one.

    python examples/plain_loop.py --output out/plain

Seconds on a CPU; needs nothing but the package (and, for the plot, matplotlib).
"""

import argparse
import copy
from pathlib import Path

import torch
from checking import whole
from peft import get_peft_model
from torch import nn

from peft_dynamic import DyLoRAConfig
from peft_dynamic.export import export_lora
from peft_dynamic.ranks import rank_curve


def main(output: Path, steps: int) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    # The task: the same model, with a change of rank 4 in its last layer whose parts are of falling size.
    teacher = copy.deepcopy(base).requires_grad_(False)
    teacher[2].weight += torch.randn(16, 4) @ torch.diag(torch.tensor([1.0, 0.5, 0.25, 0.1])) @ torch.randn(4, 64) / 8

    model = get_peft_model(base, DyLoRAConfig(r=8, ranks=[1, 2, 4, 8], lora_alpha=8, target_modules=["2"]))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model.train()
    for _ in range(steps):  # nothing to call: the optimizer's step draws the next rank
        x = torch.randn(64, 16)
        loss = (model(x) - teacher(x)).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    x = torch.randn(1024, 16)
    curve = rank_curve(model, lambda m: {"mse": (m(x) - teacher(x)).pow(2).mean().item()})
    best = curve.recommend(tolerance=0.2)
    print(curve.table())
    curve.to_json(output / "curve.json")
    print(f"rank {best} is in {export_lora(model, output / 'lora', rank=best)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/plain"))
    parser.add_argument("--steps", type=whole(1), default=500)
    arguments = parser.parse_args()
    main(arguments.output, arguments.steps)
