"""The `peft-dynamic` command. One file per verb; heavy imports wait inside the verbs."""

import typer

from . import export, models, train

app = typer.Typer(
    name="peft-dynamic",
    help="Adapters of dynamic rank for Hugging Face PEFT: train once, pick a rank.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(train.train)
app.command()(export.export)
app.command()(models.models)


def main() -> None:
    """Run the command."""
    app()
