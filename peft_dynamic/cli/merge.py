"""`peft-dynamic merge` and `average`: sums and means of finished LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_dynamic.cli._answer import DRY_RUN, JSON, answering
from peft_dynamic.cli._given import OUT, bad_input, check_adapter, require
from peft_dynamic.cli._written import check_place, described, place, tell

ALL = Annotated[list[str], typer.Argument(help="Adapters, each as FOLDER=WEIGHT or a name on the Hub=WEIGHT.")]


def merge(
    out: OUT,
    adapters: ALL,
    rank: Annotated[int | None, typer.Option(help="Of each module. Default: the exact sum.")] = None,
    dry_run: DRY_RUN = False,
    as_json: JSON = False,
) -> None:
    """Write the weighted sum of LoRA adapters as one.

    For example: peft-dynamic merge runs/both runs/sql=0.7 runs/chat=0.3 --rank 16
    """
    if "=" in str(out) and not out.exists():
        raise typer.BadParameter(
            f"{out} looks like ADAPTER=WEIGHT. The folder to write comes first: peft-dynamic merge OUT ADAPTER=WEIGHT.",
            param_hint="OUT",
        )
    weights = _weights(adapters)
    _check(out, [*weights], rank)
    from peft_dynamic.algebra import merge_adapters

    with answering(as_json) as answer:
        with bad_input(), place(out, dry_run, *weights) as folder:
            merge_adapters(weights, folder, rank)
            answer |= {"out": str(out), "written": not dry_run, "weights": weights, **described(folder)}
        if dry_run:
            tell(answer, out)
        else:
            typer.echo(f"{out} is the sum of {len(weights)} adapters, as a stock LoRA adapter.")


def average(
    out: OUT,
    adapters: Annotated[list[str], typer.Argument(help="Adapters, e.g. the checkpoints of a run.")],
    rank: Annotated[int | None, typer.Option(help="Of each module. Default: that of the first adapter.")] = None,
    dry_run: DRY_RUN = False,
    as_json: JSON = False,
) -> None:
    """Write the mean of LoRA adapters: of their products, not of their factors.

    For example: peft-dynamic average runs/mean runs/sql/checkpoint-100 runs/sql/checkpoint-200
    """
    if len(adapters) < 2:
        raise typer.BadParameter(
            "one adapter has no mean. The folder to write comes first: peft-dynamic average OUT ADAPTER OTHER.",
            param_hint="ADAPTERS",
        )
    _check(out, adapters, rank)
    from peft_dynamic.algebra import average_adapters

    with answering(as_json) as answer:
        with bad_input(), place(out, dry_run, *adapters) as folder:
            average_adapters(adapters, folder, rank)
            answer |= {"out": str(out), "written": not dry_run, "adapters": adapters, **described(folder)}
        if dry_run:
            tell(answer, out)
        else:
            typer.echo(f"{out} is the mean of {len(adapters)} adapters, as a stock LoRA adapter.")


def _weights(adapters: list[str]) -> dict[str, float]:
    """Adapter -> its weight."""
    weights: dict[str, float] = {}
    for word in adapters:
        name, found, weight = word.rpartition("=")
        try:
            weights[name] = float(weight) if found else float("nan")
        except ValueError:
            found = ""
        if not found or not name:
            raise typer.BadParameter(f"{word}: must be ADAPTER=WEIGHT, such as runs/sql=0.7.", param_hint="ADAPTERS")
    return weights


def _check(out: Path, adapters: list[str], rank: int | None) -> None:
    """Stop, before anything is imported, where an adapter is not there or nothing can be written."""
    require(rank is None or rank >= 1, "--rank", rank, "at least 1")
    for adapter in adapters:
        check_adapter(adapter, "ADAPTERS")
    with bad_input("OUT"):
        check_place(out, *adapters)
