"""`peft-dynamic inspect`: what a finished LoRA adapter holds, without a base model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from peft_dynamic.cli._answer import JSON, answering
from peft_dynamic.cli._given import ADAPTER, bad_input, check_picture
from peft_dynamic.cli._subject import adapter_folder, check_product, read_config


def inspect(
    adapter: ADAPTER,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it: a file that ends in .png, .svg or .pdf.", show_default=False)
    ] = None,
    as_json: JSON = False,
) -> None:
    """Show an adapter's type, size, and how much of its update each rank keeps.

    For example: peft-dynamic inspect runs/sql --plot energy.png
    """
    folder = adapter_folder(adapter)
    if plot is not None:
        check_picture(plot)
    check_product(read_config(folder), adapter)
    from peft_dynamic.algebra.checkpoint import read_checkpoint
    from peft_dynamic.algebra.inspect import energy_plot, energy_table, summary

    with bad_input("ADAPTER"):
        read = replace(read_checkpoint(folder), name=adapter)
    with answering(as_json) as answer:
        answer |= summary(read)
        if not as_json:
            typer.echo(energy_table(read))
        if plot is not None:
            energy_plot(read, plot, title=Path(adapter).name)
            typer.echo(f"The picture is in {plot}.")
