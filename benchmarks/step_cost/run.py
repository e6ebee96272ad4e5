"""What DyLoRA costs beside PEFT's LoRA of the same r: step time, peak memory, inference at a rank, compilations.

    PYTHONPATH=. python benchmarks/step_cost/run.py --model DIR [--repeats 40] [--out benchmarks/step_cost/results.json]

Times are taken interleaved, one step of each in turn in one process, since the machine is noisy: read the ratios. Peak
memory is each variant's own process: the highest resident size during the steps less that before the first.
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
from transformers import AutoModelForCausalLM

from benchmarks.timing import batch, in_turn, peak_memory, printed_by, ratios, step, with_optimizer
from peft_dynamic import DyLoRAConfig

RANKS = [1, 2, 4, 8, 16, 32]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, LENGTH = 2, 64


def variants() -> dict[str, Any]:
    common = {"r": RANKS[-1], "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return {
        "lora": LoraConfig(**common),
        "dylora": DyLoRAConfig(ranks=RANKS, **common),
        "dylora uniform": DyLoRAConfig(ranks=RANKS, rank_sampling="uniform", **common),
        "dylora paper": DyLoRAConfig.paper(ranks=RANKS, **common),
    }


def prepared(folder: Path, config: Any) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    return with_optimizer(get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config))


def step_times(folder: Path, ids: torch.Tensor, repeats: int) -> dict[str, Any]:
    models = {name: prepared(folder, config) for name, config in variants().items()}
    times = in_turn({name: partial(step, *each, ids) for name, each in models.items()}, repeats)
    return ratios(times, "lora")


def inference_times(folder: Path, ids: torch.Tensor, repeats: int) -> dict[str, Any]:
    """A forward pass at rank b against a stock LoRA of rank b, and one that decodes a single token."""
    dynamic, _ = prepared(folder, variants()["dylora"])
    perturb(dynamic)
    dynamic.eval()
    result: dict[str, Any] = {}
    for rank in (RANKS[0], 8, RANKS[-1]):
        config = LoraConfig(r=rank, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
        stock, _ = prepared(folder, config)
        perturb(stock)
        stock.eval()
        for what, part in (("forward", ids), ("one token", ids[:1, :1])):
            calls = {"lora": partial(stock, input_ids=part), "dylora": partial(dynamic, input_ids=part)}
            with torch.no_grad(), dynamic.at_rank(rank):
                times = in_turn(calls, repeats)
            result[f"{what} at rank {rank}"] = ratios(times, "lora")["dylora"]
    return result


def perturb(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)


def compilations(folder: Path) -> dict[str, int]:
    """Graphs that torch.compile makes in 24 training steps, by kind of truncation."""
    from torch._dynamo.utils import counters
    from transformers import AutoConfig

    found, ids = {}, batch(folder, BATCH, LENGTH)
    for name, config in variants().items():
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        small = AutoConfig.from_pretrained(folder, num_hidden_layers=2)
        model = get_peft_model(AutoModelForCausalLM.from_config(small), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        compiled = torch.compile(model, backend="eager")
        drawn = set()
        for _ in range(24):
            ranks = next((m.lora_views for m in model.modules() if hasattr(m, "lora_views")), None)
            drawn.add(ranks["default"].schedule.drawn if ranks else RANKS[-1])
            compiled.train()(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found[name] = {
            "graphs": counters["stats"]["unique_graphs"],
            "graph_breaks": sum(counters["graph_break"].values()),
            "ranks_drawn": len(drawn),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        ids = batch(args.model, BATCH, LENGTH)
        trained = prepared(args.model, variants()[args.memory_of])
        print(peak_memory(lambda: [step(*trained, ids) for _ in range(5)]))
        return
    ids = batch(args.model, BATCH, LENGTH)
    memory = {name: printed_by(__file__, "--model", str(args.model), "--memory-of", name) for name in variants()}
    record = {
        "what": f"SmolLM2-135M, float32, {len(TARGETS)} targets per layer, r={RANKS[-1]}, batch {BATCH} x {LENGTH}",
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": args.threads},
        "versions": {name: version(name) for name in ("torch", "peft", "transformers")},
        "repeats": args.repeats,
        "training_step": step_times(args.model, ids, args.repeats),
        "peak_memory_mib": {name: {"mib": mib, "ratio": mib / memory["lora"]} for name, mib in memory.items()},
        "inference": inference_times(args.model, ids, args.repeats),
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")  # what is there, should the last part fail
    record["compile"] = compilations(args.model)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
