"""`peft-dynamic merge` and `average`: sums and means of finished LoRA adapters."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from peft_dynamic.cli._answer import DRY_RUN, JSON, answering
from peft_dynamic.cli._given import OUT, Engine, bad_input, check_adapter, count_or_share, require
from peft_dynamic.cli._written import check_place, described, place, tell

ALL = Annotated[list[str], typer.Argument(help="Adapters, each as FOLDER=WEIGHT or a name on the Hub=WEIGHT.")]


def merge(
    out: OUT,
    adapters: ALL,
    rank: Annotated[int | None, typer.Option(help="Of each module. Default: the exact sum.")] = None,
    parameters: Annotated[
        float | None,
        typer.Option(help="A share of the sum's numbers, or a count: ranks per module.", show_default=False),
    ] = None,
    moments: Annotated[
        list[Path] | None,
        typer.Option(help="For each adapter, in their order, what resize --moments wrote; cuts --rank by it."),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="Who reads it. For vllm and llama.cpp all modules are padded to the largest rank.")
    ] = Engine.peft,
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
    size = None if parameters is None else count_or_share(parameters)
    require(rank is None or size is None, "--parameters", parameters, "left out where --rank is given")
    for path in moments or []:
        require(path.is_file(), "--moments", path, "a file that resize --moments wrote")
    known = len(moments or []) in (0, len(weights)) and (not moments or rank is not None)
    require(known, "--moments", len(moments or []), f"given once for each of the {len(weights)} adapters, with --rank")
    with answering(as_json) as answer:
        with bad_input(), place(out, dry_run, *weights) as folder:
            _sum(weights, folder, rank, size, moments or [], engine)
            answer |= {"out": str(out), "written": not dry_run, "weights": weights, **described(folder)}
        if dry_run:
            tell(answer, out)
        else:
            typer.echo(f"{out} is the sum of {len(weights)} adapters, as a stock LoRA adapter.")


def _sum(
    weights: dict[str, float],
    folder: Path,
    rank: int | None,
    size: int | float | None,
    moments: list[Path],
    engine: Engine,
) -> None:
    """Write the sum; for a budget, or an engine of one rank, through the exact one."""
    from peft_dynamic.algebra import AdapterMoments, merge_adapters, resize_adapter
    from peft_dynamic.algebra.checkpoint import read_checkpoint

    seen = {name: AdapterMoments.load(path) for name, path in zip(weights, moments, strict=bool(moments))}
    if size is None and engine == Engine.peft:
        merge_adapters(weights, folder, rank, moments=seen or None)
        return
    with tempfile.TemporaryDirectory() as work:
        whole = merge_adapters(weights, Path(work, "sum"), rank, moments=seen or None)
        most = max(product.rank for product in read_checkpoint(whole).products.values())
        budget = {"rank": most} if size is None else {"parameters": size}
        resize_adapter(whole, folder, **budget, engine=engine.value)


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
        require(name not in weights, "ADAPTERS", word, "an adapter that is named once: add its weights up")
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
