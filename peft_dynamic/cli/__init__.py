"""The `peft-dynamic` command. One file per verb; heavy imports wait inside the verbs."""

import io
import sys

import typer

from peft_dynamic.cli import (
    _recipe,
    _version,
    card,
    chat,
    cite,
    classify,
    compare,
    export,
    inspect,
    measure,
    merge,
    models,
    page,
    ppo,
    push,
    resize,
    sft,
    soft,
    train,
)
from peft_dynamic.cli._edge import Edge

app = typer.Typer(
    name="peft-dynamic",
    cls=Edge,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.callback(invoke_without_command=True)(_version.command)
app.command()(train.train)
for training in (sft.sft, soft.soft, ppo.ppo, cite.cite, classify.classify):
    app.command(**_recipe.PASSED_ON)(training)
app.command()(export.export)
app.command()(models.models)
for verb in (measure.measure, compare.compare, inspect.inspect, resize.resize, merge.merge, merge.average):
    app.command()(verb)
app.command()(push.push)
app.command()(card.card)
app.command()(chat.chat)
app.command()(page.app)


def main() -> None:
    """Run the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows few letters costs letters, not the run
            stream.reconfigure(errors="backslashreplace")
    app()
