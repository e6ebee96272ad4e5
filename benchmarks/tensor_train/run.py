"""Ways to apply a tensor train to a batch, by number of tokens; and what AdamW takes for cores kept apart or together.

Microseconds, the median over rounds in which the ways take turns, forward and forward with backward: the authors' way
(all cores to the whole tensor one after another, then one product; written here from its description), the dense
matrix contracted from both ends, two thin matrices, and core by core with nothing built.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.study import Cell, Context
from benchmarks.summary import table
from peft_dynamic.functional.tensor_train import apply_split, contract, core_shapes, factorize, init_cores, split

SIZES = [(768, 64, 5), (4096, 64, 8)]  # in, out, rank: RoBERTa-base's and LLaMA-2-7B's adapters
TOKENS = [1, 4, 16, 64, 512]
Way = Callable[[torch.Tensor, list[torch.Tensor], int, int], torch.Tensor]


def authors(x: torch.Tensor, cores: list[torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    whole = cores[0]
    for core in cores[1:]:
        whole = torch.tensordot(whole, core, dims=([-1], [0]))
    return x @ whole.reshape(rows, columns)


def dense(x: torch.Tensor, cores: list[torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    return x @ contract(cores, rows, columns)


def thin(x: torch.Tensor, cores: list[torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    return apply_split(x, *split(cores, rows))


def core_by_core(x: torch.Tensor, cores: list[torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    """The cores of `rows` are summed over with x one at a time; those of `columns` add their factor to the output."""
    taken, left = 1, x.unsqueeze(-1)  # (tokens, what is left of rows, r)
    for core in cores:
        before, k, after = core.shape
        if taken < rows:
            tokens, rest, _ = left.shape
            parts = left.view(tokens, k, rest // k, before).transpose(1, 2).reshape(tokens, rest // k, k * before)
            left = parts @ core.transpose(0, 1).reshape(k * before, after)
            taken *= k
        else:
            left = (left.reshape(-1, before) @ core.reshape(before, k * after)).view(len(x), -1, after)
    return left.reshape(len(x), columns)


WAYS: dict[str, Way] = {"authors": authors, "dense": dense, "two thin matrices": thin, "core by core": core_by_core}


def timed(rows: int, columns: int, rank: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    cores = [core.requires_grad_() for core in init_cores(factorize(rows, columns), rank, rows, columns)]
    x = torch.randn(tokens, rows)
    expected = authors(x, cores, rows, columns)
    for name, way in WAYS.items():
        assert torch.allclose(way(x, cores, rows, columns), expected, atol=1e-4), name
    taken: dict[str, dict[str, list[float]]] = {name: {"forward": [], "with_backward": []} for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            with torch.no_grad():
                start = time.perf_counter()
                way(x, cores, rows, columns)
                taken[name]["forward"].append(time.perf_counter() - start)
            start = time.perf_counter()
            way(x, cores, rows, columns).sum().backward()
            taken[name]["with_backward"].append(time.perf_counter() - start)
    return {name: {what: round(1e6 * median(times), 1) for what, times in each.items()} for name, each in taken.items()}


def optimizer_step(together: bool, rounds: int, adapters: int = 120, rank: int = 5) -> float:
    """Milliseconds of AdamW over the trains of that many adapters of 576 and 64 (SmolLM2-135M has 60, of two each)."""
    shapes = core_shapes(factorize(576, 64), rank)
    sizes = [a * b * c for a, b, c in shapes]
    parameters = [
        torch.nn.Parameter(torch.randn(size)) for _ in range(adapters) for size in ([sum(sizes)] if together else sizes)
    ]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return round(1e3 * median(times), 2)


def run(cell: Cell, context: Context) -> dict[str, Any]:
    rounds = context.settings["rounds"]
    if cell["part"] == "adamw":
        apart, together = (optimizer_step(at_once, rounds) for at_once in (False, True))
        return {"adamw_step_ms": {"a parameter for each core": apart, "one for all cores of a train": together}}
    found = {
        f"{rows} -> {columns}, r = {rank}": {str(n): timed(rows, columns, rank, n, rounds) for n in TOKENS}
        for rows, columns, rank in SIZES
    }
    return {"rounds": rounds, "contraction": found}


def report(record: dict[str, Any], context: Context) -> str:
    tables = []
    for what, title in (("forward", "forward, μs"), ("with_backward", "forward and backward, μs")):
        lines = [
            [layer, tokens, *(f"{each[name][what]:.0f}" for name in WAYS)]
            for layer, by_tokens in record.get("contraction", {}).items()
            for tokens, each in by_tokens.items()
        ]
        tables.append(table([title, "tokens", *WAYS], lines, right=range(1, 2 + len(WAYS))))
    steps = [[name, ms] for name, ms in record.get("adamw_step_ms", {}).items()]
    return "\n\n".join([*tables, table(["AdamW, 120 adapters", "ms a step"], steps, right=[1])])
