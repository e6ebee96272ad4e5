"""Time and memory of a training step with passages encoded apart (FiD) and as one encoder input, 2 to 40 passages.

    PYTHONPATH=. python benchmarks/fid_cost/run.py

A T5 of T5-small's shape with random weights, 64 tokens a passage, an answer of 32 tokens, one row, float32, one thread.
The variants take turns in one process for the times; for the memory each has a process of its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from transformers import T5Config, T5ForConditionalGeneration

from benchmarks.timing import in_turn
from peft_dynamic.trainers import FiDForConditionalGeneration

HERE = Path(__file__).parent
PASSAGES, TOKENS, ANSWER, REPEATS = (2, 5, 10, 20, 40), 64, 32, 3
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


def memory(variant: str) -> dict[str, float]:
    """MiB above the loaded model at the highest point so far, of more and more passages."""
    t5 = model()
    step(t5, "FiD", 2)  # the gradients' memory, and what the libraries take once
    start = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    peaks = {}
    for count in PASSAGES[:-1]:  # as one input 40 take above 6 GB
        step(t5, variant, count)
        peaks[str(count)] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - start
    return peaks


def times() -> dict[str, dict[str, float]]:
    t5 = model()
    calls = {
        f"{variant}|{count}": (lambda variant=variant, count=count: step(t5, variant, count))
        for count in PASSAGES
        for variant in VARIANTS
    }
    taken = in_turn(calls, REPEATS)
    return {
        variant: {str(count): statistics.median(taken[f"{variant}|{count}"]) for count in PASSAGES}
        for variant in VARIANTS
    }


def plot(results: dict[str, Any], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, label in (
        (axes[0], "seconds", "seconds per training step"),
        (axes[1], "mib", "MiB above the model"),
    ):
        for variant, marker in zip(VARIANTS, "osx", strict=True):
            found = results[key][variant]
            axis.plot([int(n) for n in found], [*found.values()], marker=marker, label=variant)
        axis.set_xlabel(f"passages of {TOKENS} tokens")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-of", choices=VARIANTS, help="print the peaks of this one")
    parser.add_argument("--part", choices=["times", "memory"], help="only this, and keep the other of results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        print(json.dumps(memory(arguments.memory_of)))
        return
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    settings = {"tokens_per_passage": TOKENS, "answer_tokens": ANSWER, "repeats": REPEATS, "torch": torch.__version__}
    results |= settings
    if arguments.part in (None, "times"):
        results["seconds"] = times()
    if arguments.part in (None, "memory"):
        command = [sys.executable, __file__, "--memory-of"]
        results["mib"] = {
            variant: json.loads(subprocess.run([*command, variant], check=True, capture_output=True, text=True).stdout)
            for variant in VARIANTS
        }
    file.write_text(json.dumps(results, indent=2) + "\n")
    if {"seconds", "mib"} <= results.keys():
        plot(results, HERE / "cost.png")


if __name__ == "__main__":
    main()
