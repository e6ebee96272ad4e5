"""`peft-dynamic resize`, `merge` and `average`: finished LoRA adapters as products."""

from __future__ import annotations

from typing import Annotated

import typer

from peft_dynamic.cli._given import ADAPTER, OUT, bad_input


def resize(
    adapter: ADAPTER,
    out: OUT,
    rank: Annotated[int | None, typer.Option(help="The rank of every module.")] = None,
    parameters: Annotated[
        float | None, typer.Option(help="A share of the numbers up to 1, or a count: ranks per module for this budget.")
    ] = None,
    bytes: Annotated[int | None, typer.Option(help="The same for a size in bytes.")] = None,
) -> None:
    """Write any LoRA adapter at a lower rank, or with ranks per module for a budget."""
    from peft_dynamic.algebra import resize_adapter
    from peft_dynamic.algebra.checkpoint import read_checkpoint

    budget = int(parameters) if parameters is not None and parameters > 1 else parameters
    with bad_input():
        resize_adapter(adapter, out, rank=rank, parameters=budget, bytes=bytes)
        before, after = read_checkpoint(adapter).size, read_checkpoint(out).size
    typer.echo(f"{out} has {after:,} of the {before:,} numbers of {adapter}, as a stock LoRA adapter.")


def merge(
    out: OUT,
    adapters: Annotated[list[str], typer.Argument(help="Adapters, each as FOLDER=WEIGHT or a name on the Hub=WEIGHT.")],
    rank: Annotated[int | None, typer.Option(help="Of each module. Default: the exact sum.")] = None,
) -> None:
    """Write the weighted sum of LoRA adapters as one."""
    from peft_dynamic.algebra import merge_adapters

    weights: dict[str, float] = {}
    for word in adapters:
        name, found, weight = word.rpartition("=")
        try:
            weights[name] = float(weight) if found else float("nan")
        except ValueError:
            found = ""
        if not found or not name:
            raise typer.BadParameter(f"{word}: must be ADAPTER=WEIGHT, such as runs/sql=0.7.", param_hint="ADAPTERS")
    with bad_input():
        merge_adapters(weights, out, rank)
    typer.echo(f"{out} is the sum of {len(weights)} adapters, as a stock LoRA adapter.")


def average(
    out: OUT,
    adapters: Annotated[list[str], typer.Argument(help="Adapters, e.g. the checkpoints of a run.")],
    rank: Annotated[int | None, typer.Option(help="Of each module. Default: that of the first adapter.")] = None,
) -> None:
    """Write the mean of LoRA adapters: of their products, not of their factors."""
    from peft_dynamic.algebra import average_adapters

    with bad_input():
        average_adapters(adapters, out, rank)
    typer.echo(f"{out} is the mean of {len(adapters)} adapters, as a stock LoRA adapter.")
