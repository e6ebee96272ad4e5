"""What the cost benchmarks share: steps and calls timed in turn, their ratios, and peak memory.

The machine is noisy, so each variant is timed once a round, in one process, in an order that rotates: read the ratios.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

WARM_UP = 2  # rounds that are not counted


def batch(model: Path, size: int, length: int) -> torch.Tensor:
    """(size, length) ids of real text, the data set that the package ships."""
    data = Path(__file__).parents[1] / "peft_dynamic/data/e2e_nlg_train.jsonl"
    text = " ".join(" ".join(map(str, json.loads(row).values())) for row in data.read_text().splitlines()[:200])
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    return torch.tensor(ids[: size * length]).view(size, length)


def with_optimizer(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, labels: torch.Tensor | None = None) -> None:
    """With the ids as labels where none are given."""
    model.train()(input_ids=ids, labels=ids if labels is None else labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + WARM_UP):
        first = repeat % len(calls)
        for name in [*calls][first:] + [*calls][:first]:
            start = time.perf_counter()
            calls[name]()
            if repeat >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return times


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


def peak_memory(work: Callable[[], Any]) -> float:
    """MiB that the process grows by, at its highest, while it works; for a process that does nothing else.

    VmHWM, not getrusage's ru_maxrss: the latter begins at the peak of the process that started this one.
    """
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """MiB, of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def printed_by(script: str, *arguments: str) -> float:
    """The last word that a script prints when run in a process of its own."""
    command = [sys.executable, script, *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
