"""What DyLoRA costs beside PEFT's LoRA of the same r: step time, peak memory, inference at a rank, compilations.

    python benchmarks/step_cost/run.py --model DIR [--repeats 40] [--out benchmarks/step_cost/results.json]

Times are taken interleaved, one step of each in turn in one process, since the machine is noisy: read the ratios. Peak
memory is each variant's own process: the highest resident size during the steps less that before the first.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def batch(model: Path) -> torch.Tensor:
    """(BATCH, LENGTH) ids of real text, the data set that the package ships."""
    data = Path(__file__).parents[2] / "peft_dynamic/data/e2e_nlg_train.jsonl"
    text = " ".join(" ".join(map(str, json.loads(row).values())) for row in data.read_text().splitlines()[:200])
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    return torch.tensor(ids[: BATCH * LENGTH]).view(BATCH, LENGTH)


def prepared(folder: Path, config: Any) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def ratios(times: dict[str, list[float]], reference: str) -> dict[str, Any]:
    """Mean and median over the rounds of each variant's time over the reference's in the same round."""
    found = {}
    for name, taken in times.items():
        each = [mine / other for mine, other in zip(taken, times[reference], strict=True)]
        found[name] = {
            "seconds_mean": statistics.mean(taken),
            "ratio_of_means": statistics.mean(taken) / statistics.mean(times[reference]),
            "ratio_median": statistics.median(each),
            "ratio_quartiles": statistics.quantiles(each, n=4),
        }
    return found


def step_times(folder: Path, ids: torch.Tensor, repeats: int) -> dict[str, Any]:
    models = {name: prepared(folder, config) for name, config in variants().items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 2):
        order = list(models)[repeat % len(models) :] + list(models)[: repeat % len(models)]
        for name in order:
            taken = step(*models[name], ids)
            if repeat >= 2:
                times[name].append(taken)
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
            times: dict[str, list[float]] = {"lora": [], "dylora": []}
            with torch.no_grad(), dynamic.at_rank(rank):
                for repeat in range(repeats + 2):
                    for name, model in (("lora", stock), ("dylora", dynamic))[:: 1 if repeat % 2 else -1]:
                        start = time.perf_counter()
                        model(input_ids=part)
                        if repeat >= 2:
                            times[name].append(time.perf_counter() - start)
            result[f"{what} at rank {rank}"] = ratios(times, "lora")["dylora"]
    return result


def perturb(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)


def peak_memory(folder: Path, name: str, steps: int) -> float:
    """MiB above the size before the first step; run in a process of its own."""
    ids = batch(folder)
    model, optimizer = prepared(folder, variants()[name])
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    for _ in range(steps):
        step(model, optimizer, ids)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def compilations(folder: Path) -> dict[str, int]:
    """Graphs that torch.compile makes in 24 training steps, by kind of truncation."""
    from torch._dynamo.utils import counters
    from transformers import AutoConfig

    found = {}
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
            ranks = next((m.lora_ranks for m in model.modules() if hasattr(m, "lora_ranks")), None)
            drawn.add(ranks["default"].schedule.drawn if ranks else RANKS[-1])
            compiled.train()(input_ids=batch(folder), labels=batch(folder)).loss.backward()
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
        print(peak_memory(args.model, args.memory_of, steps=5))
        return
    ids = batch(args.model)
    memory = {}
    for name in variants():
        command = [sys.executable, __file__, "--model", str(args.model), "--memory-of", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        memory[name] = float(output.split()[-1])
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
