"""The `peft-dynamic` command. One file per verb; heavy imports wait inside the verbs."""

import io
import sys

import typer

from peft_dynamic.cli import chat, export, inspect, measure, models, page, resize, train
from peft_dynamic.cli._edge import Edge

app = typer.Typer(
    name="peft-dynamic",
    cls=Edge,
    help="Adapters of dynamic rank for Hugging Face PEFT: train once, pick a rank.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(train.train)
app.command()(export.export)
app.command()(models.models)
for verb in (measure.measure, inspect.inspect, resize.resize, resize.merge, resize.average):
    app.command()(verb)
app.command()(chat.chat)
app.command()(page.app)


def main() -> None:
    """Run the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows few letters costs letters, not the run
            stream.reconfigure(errors="backslashreplace")
    app()
