"""The `peft-dynamic` command. One file per verb; heavy imports wait inside the verbs, so that --help and errors are quick."""

import typer

from .export import export
from .models import models
from .train import train

app = typer.Typer(
    name="peft-dynamic",
    help="Adapters of dynamic rank for Hugging Face PEFT: train once, pick a rank.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(train)
app.command()(export)
app.command()(models)


def main() -> None:
    """Run the command."""
    app()
