"""What DyLoRA costs beside PEFT's LoRA of the same r: step time, peak memory, inference at a rank, compilations.

Times are taken interleaved, one step of each in turn in one process. Peak memory is each variant's own process.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks import timing
from benchmarks.study import Cell, Context
from benchmarks.summary import table
from peft_dynamic import DyLoRAConfig

RANKS = [1, 2, 4, 8, 16, 32]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, LENGTH = 2, 64


def variants() -> dict[str, Any]:
    common = {"r": RANKS[-1], "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return {
        "lora": LoraConfig(**common),
        "dylora": DyLoRAConfig(ranks=RANKS, rank_sampling="mostly_full", **common),
        "dylora uniform": DyLoRAConfig(ranks=RANKS, rank_sampling="uniform", **common),
        "dylora paper": DyLoRAConfig.paper(ranks=RANKS, **common),
    }


def prepared(folder: Path, config: Any) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    return timing.with_optimizer(
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    )


def step_times(folder: Path, ids: torch.Tensor, repeats: int) -> dict[str, Any]:
    models = {name: prepared(folder, config) for name, config in variants().items()}
    times = timing.in_turn({name: partial(timing.step, *each, ids) for name, each in models.items()}, repeats)
    return timing.ratios(times, "lora")


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
                times = timing.in_turn(calls, repeats)
            result[f"{what} at rank {rank}"] = timing.ratios(times, "lora")["dylora"]
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

    found, ids = {}, timing.batch(folder, BATCH, LENGTH)
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


def grown(variant: str, folder: Path) -> float:
    """MiB that five steps need."""
    ids, trained = timing.batch(folder, BATCH, LENGTH), prepared(folder, variants()[variant])
    return timing.peak_memory(lambda: [timing.step(*trained, ids) for _ in range(5)])


def run(cell: Cell, context: Context) -> dict[str, Any]:
    folder, rounds = context.paths["models"] / "smollm2", context.settings["rounds"]
    if cell["part"] == "memory":
        return {"peak_memory_mib": timing.memory_of(grown, variants(), "lora", folder)}
    if cell["part"] == "compile":
        return {"compile": compilations(folder)}
    ids = timing.batch(folder, BATCH, LENGTH)
    if cell["part"] == "inference":
        return {"inference": inference_times(folder, ids, rounds)}
    return {"training_step": step_times(folder, ids, rounds)}


def report(record: dict[str, Any], context: Context) -> str:
    steps, memory, graphs = (record.get(part, {}) for part in ("training_step", "peak_memory_mib", "compile"))
    lines = []
    for name in list(steps or memory or graphs):
        compiled = graphs.get(name)
        made = f"{compiled['graphs']} for {compiled['ranks_drawn']} ranks" if compiled else ""
        taken = steps.get(name)
        lines.append(
            [
                name,
                timing.shown_ratio(taken),
                timing.shown_quartiles(taken),
                timing.shown_ratio(memory.get(name), "ratio"),
                made,
            ]
        )
    text = table(["over LoRA", "step", "quartiles", "peak memory", "graphs"], lines)
    inference = [
        [name, timing.shown_ratio(each), timing.shown_quartiles(each)]
        for name, each in record.get("inference", {}).items()
    ]
    return text + "\n\n" + table(["inference over a LoRA of that rank", "time", "quartiles"], inference)
