"""What it costs that each row of a batch has a rank of its own: a forward pass and a generation, timed in turn.

Seconds are those in which the process had a processor, since the machine has other jobs. The reference is the model at
its full rank, for which nothing has to be set. `at rank 8` sets the rank in each call, as a server does that answers
one request after the other; `apart` answers the rows so, one after the other.
"""

import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks import timing
from benchmarks.study import Cell, Context
from benchmarks.summary import table
from peft_dynamic import DyLoRAConfig, at_rank

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = {"3 rows": [2, 8, 32], "8 rows": [1, 2, 4, 8, 16, 32, 8, None]}
REFERENCE = "full rank"
SET = "at rank 8"


def prepared(context: Context, adapter: str) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(context.paths["models"] / "smollm2", dtype=torch.float32)
    common = {"r": 32, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, DyLoRAConfig(**common) if adapter == "dylora" else LoraConfig(**common))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.eval()


def run(cell: Cell, context: Context) -> dict[str, Any]:
    model, found = prepared(context, cell["adapter"]), {}
    tokens = cell["new_tokens"]
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}

    def call(ids: torch.Tensor, **more: Any) -> None:
        with torch.no_grad():
            if cell["what"] == "forward":
                model(input_ids=ids, **more)
            else:
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **more)

    def at_8(ids: torch.Tensor) -> None:
        with at_rank(model, 8):
            call(ids)

    def apart(ids: torch.Tensor, ranks: list[Any]) -> None:
        for rank, row in zip(ranks, ids.split(1), strict=True):
            with at_rank(model, rank) if rank else model.disable_adapter():
                call(row)

    for name, ranks in ROWS.items():
        ids = timing.batch(context.paths["models"] / "smollm2", len(ranks), cell["length"])
        calls = {
            REFERENCE: lambda ids=ids: call(ids),
            SET: lambda ids=ids: at_8(ids),
            "ranks of their own": lambda ids=ids, ranks=ranks: call(ids, ranks=ranks),
        }
        if len(ranks) == 3:
            calls["apart"] = lambda ids=ids, ranks=ranks: apart(ids, ranks)
        found[name] = timing.ratios(timing.in_turn(calls, context.settings["rounds"], time.process_time), REFERENCE)
    size = f" {tokens} tokens" if cell["what"] == "generate" else ""
    return {f"{cell['adapter']}, {cell['what']}{size} after {cell['length']}": found}


def report(record: dict[str, Any], context: Context) -> str:
    lines = []
    for what, by_rows in record.items():
        for rows, times in by_rows.items() if what != "conditions" else ():
            for name, each in times.items():
                if name != REFERENCE:
                    over_set = each["seconds_mean"] / times[SET]["seconds_mean"]
                    cells = [timing.shown_ratio(each), timing.shown_quartiles(each), f"{over_set:.3f}"]
                    lines.append([what, rows, name, *cells])
    return table(["adapter", "batch", "", "over the full rank", "quartiles", f"mean over {SET}"], lines)
