"""What the studies of cost share: steps and calls timed in turn, their ratios, and peak memory.

The machine is noisy, so each variant is timed once a round, in one process, in an order that rotates: read the ratios.
"""

import json
import re
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

WARM_UP = 2  # rounds that are not counted


def batch(model: Path, size: int, length: int) -> torch.Tensor:
    """(size, length) ids of real text, the data set that the package ships."""
    data = Path(__file__).parents[1] / "peft_dynamic/data/e2e_nlg_train.jsonl"
    text = " ".join(
        " ".join(map(str, json.loads(row).values())) for row in data.read_text(encoding="utf-8").split("\n")[:200]
    )
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    return torch.tensor(ids[: size * length]).view(size, length)


def with_optimizer(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, labels: torch.Tensor | None = None) -> None:
    """With the ids as labels where none are given."""
    model.train()(input_ids=ids, labels=ids if labels is None else labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def in_turn(
    calls: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, round by round; with `time.process_time`, those in which it had the processor."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + WARM_UP):
        first = repeat % len(calls)
        for name in [*calls][first:] + [*calls][:first]:
            start = clock()
            calls[name]()
            if repeat >= WARM_UP:
                times[name].append(clock() - start)
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
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """MiB, of this process: "VmRSS" what it has, "VmHWM" the most that it has had."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns when it is called on one thread in a process that does nothing else."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return pool.submit(function, *arguments).result()


def memory_of(
    function: Callable[..., float], variants: Iterable[str], reference: str, *arguments: Any
) -> dict[str, Any]:
    """MiB that each variant's own process grows by, and over the reference's."""
    grown = {variant: in_own_process(function, variant, *arguments) for variant in variants}
    return {variant: {"mib": mib, "ratio": mib / grown[reference]} for variant, mib in grown.items()}


def shown_ratio(found: dict[str, Any] | None, key: str = "ratio_median", digits: int = 3) -> str:
    """A cell of a table, empty where it was not measured."""
    return "" if found is None else f"{found[key]:.{digits}f}"


def shown_quartiles(found: dict[str, Any] | None, digits: int = 3) -> str:
    if found is None:
        return ""
    low, _, high = found["ratio_quartiles"]
    return f"{low:.{digits}f} to {high:.{digits}f}"
