"""`peft-dynamic --version`: of this package, and with --json of those that compute, without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from peft_dynamic import __version__
from peft_dynamic.cli._answer import answering

PACKAGES = ("torch", "peft", "transformers", "trl")


def installed(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Package -> its version, None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def command(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--version", help="Print the version of peft_dynamic.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --version: also those of torch, peft, transformers and trl.")
    ] = False,
) -> None:
    """Adapters of dynamic rank for Hugging Face PEFT: train once, pick a rank."""
    if not show:
        if as_json or context.invoked_subcommand is None:
            raise typer.BadParameter("goes with --version here. Of a verb it comes after it.", param_hint="--json")
        return
    with answering(as_json) as answer:
        answer |= {"peft_dynamic": __version__, **installed(PACKAGES)}
        if not as_json:
            typer.echo(f"peft-dynamic {__version__}")
    raise typer.Exit
