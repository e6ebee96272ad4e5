"""A training verb, as the command line sees it: its help, and the way to the code that trains. No library is loaded."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from peft_dynamic.cli._edge import require_package

# Every word goes to TRL's parser, which knows the options
PASSED_ON: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    "add_help_option": False,
}
MODEL = ("--model_name_or_path", "The base model: a folder, or a name on the Hub.")
DATA = ("--dataset_name", "Rows: a file (JSON lines, CSV, Parquet), a folder, or a data set of the Hub.")
ADAPTER = ("--adapter", "dylora, lora, moslora, or another method of PEFT; its settings are options too, as --r 8.")
RANKS = ("--ranks", "With dylora: the ranks to have in the end, as 1,2,4,8.")
OUTPUT = ("--output_dir", "The folder to write.")
CONFIG = ("--config", "A YAML file with these names as keys. An option on the command line comes before it.")
RATE = ("--learning_rate", "The peak of the learning rate.")
STEPS = ("--max_steps", "Optimizer steps; without it --num_train_epochs counts.")
BATCH = ("--per_device_train_batch_size", "Rows that a device sees at a time.")
RESUME = ("--resume_from_checkpoint", "Go on from a checkpoint, or from the last one with `true`.")


@dataclass(frozen=True)
class Verb:
    """A training verb.

    Attributes:
        name: as the user writes it.
        about: what it does, in a sentence or two.
        options: those that matter first, each with what it means.
        example: the words after the name.
    """

    name: str
    about: str
    options: tuple[tuple[str, str], ...]
    example: str

    def run(self, words: list[str], build: Callable[[], Any]) -> None:
        """Show help, or train.

        Args:
            words: what stands after the verb.
            build: gives the `Recipe` to train by; called when libraries may be loaded.
        """
        if not words or "--help" in words or "-h" in words:
            typer.echo(self.help())
            return
        require_package("trl", f"peft-dynamic {self.name}", "trl")
        from peft_dynamic.cli import _fit

        _fit.run(self.name, build(), words)

    def help(self) -> str:
        """The page of `--help`."""
        wide = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
        left = 2 + max(len(option) for option, _ in self.options)
        lines = [f"Usage: peft-dynamic {self.name} [OPTIONS]", "", *textwrap.wrap(self.about, wide), ""]
        for option, meaning in self.options:
            rest = textwrap.wrap(meaning, wide - left - 4)
            lines += [f"  {option:{left}}{rest[0]}", *(f"  {'':{left}}{line}" for line in rest[1:])]
        lines += ["", "All options, those of the trainer's configuration among them: --help-all", ""]
        return "\n".join([*lines, f"For example: peft-dynamic {self.name} {self.example}"])
