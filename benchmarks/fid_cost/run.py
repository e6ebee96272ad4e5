"""Time and memory of a training step with passages encoded apart (FiD) and as one encoder input, 2 to 40 passages.

A T5 of T5-small's shape with random weights, 64 tokens a passage, an answer of 32 tokens, one row, float32, one thread.
The variants take turns in one process for the times; for the memory each has a process of its own.
"""

import statistics
from functools import partial
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from benchmarks.pictures import legend, panels, save, style
from benchmarks.study import Cell, Context
from benchmarks.summary import table
from benchmarks.timing import in_own_process, in_turn, resident
from peft_dynamic.trainers import FiDForConditionalGeneration

TOKENS, ANSWER = 64, 32
VARIANTS = {"FiD": None, "FiD, one passage at a time": 1, "one encoder input": None}


def model() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0
    )
    return FiDForConditionalGeneration.from_model(T5ForConditionalGeneration(config)).train()


def step(t5: Any, variant: str, passages: int) -> None:
    """Forward and backward; nothing is updated."""
    ids = torch.randint(2, 32000, (1, passages, TOKENS), generator=torch.Generator().manual_seed(passages))
    labels = ids.flatten()[:ANSWER].view(1, -1)
    t5.checkpoint_passages(VARIANTS[variant])
    ids = ids.flatten(1) if variant == "one encoder input" else ids
    t5(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    t5.zero_grad(set_to_none=False)  # the gradients' memory is part of the model's


def memory(variant: str, passages: list[int]) -> dict[str, float]:
    """MiB above the loaded model at the highest point so far, of more and more passages."""
    t5 = model()
    step(t5, "FiD", 2)  # the gradients' memory, and what the libraries take once
    start = resident("VmRSS")
    peaks = {}
    for count in passages:
        step(t5, variant, count)
        peaks[str(count)] = resident("VmHWM") - start
    return peaks


def times(passages: list[int], rounds: int) -> dict[str, dict[str, float]]:
    t5 = model()
    calls = {f"{variant}|{n}": partial(step, t5, variant, n) for n in passages for variant in VARIANTS}
    taken = in_turn(calls, rounds)
    return {variant: {str(n): statistics.median(taken[f"{variant}|{n}"]) for n in passages} for variant in VARIANTS}


def run(cell: Cell, context: Context) -> dict[str, Any]:
    passages = context.settings["passages"]
    if cell["part"] == "times":
        return {"repeats": context.settings["rounds"], "seconds": times(passages, context.settings["rounds"])}
    some = [count for count in passages if count < 40]  # as one input 40 take above 6 GB
    return {"mib": {variant: in_own_process(memory, variant, some) for variant in VARIANTS}}


def plot(record: dict[str, Any], context: Context) -> None:
    figure, axes = panels(2, 9, 4.2)
    for axis, key, label in zip(
        axes, ("seconds", "mib"), ("seconds per training step", "MiB above the model"), strict=True
    ):
        for number, variant in enumerate(VARIANTS):
            found = record[key][variant]
            axis.plot([int(n) for n in found], [*found.values()], label=variant, **style(number))
        axis.set(xlabel=f"passages of {TOKENS} tokens", ylabel=label, ylim=(0, None), xticks=[int(n) for n in found])
    legend(figure, axes, len(VARIANTS))
    (slow, fast), (more, less) = ([record[key][v] for v in ("one encoder input", "FiD")] for key in ("seconds", "mib"))
    most, large = list(fast)[-1], list(less)[-1]
    finding = (
        f"With {most} passages a step of FiD is {slow[most] / fast[most]:.1f} times faster than one encoder input's, "
        f"and with {large} it takes {less[large] / more[large]:.2f} of its memory"
    )
    save(figure, context.folder / "cost.png", finding)


def report(record: dict[str, Any], context: Context) -> str:
    tables = []
    if {"seconds", "mib"} <= record.keys():
        plot(record, context)
    for key, title, digits in (("seconds", "seconds a step, passages", 2), ("mib", "MiB above the model, passages", 0)):
        found = record.get(key, {})
        counts = list(next(iter(found.values()), {}))
        lines = [[variant, *(f"{each[n]:.{digits}f}" for n in counts)] for variant, each in found.items()]
        if key == "seconds" and found:
            own, whole = found["FiD"], found["one encoder input"]
            lines.append(["one input / FiD", *(f"{whole[n] / own[n]:.2f}" for n in counts)])
        tables.append(table([title, *counts], lines, right=range(1, len(counts) + 1)))
    return "\n\n".join(tables)
