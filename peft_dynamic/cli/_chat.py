"""The chat in the terminal: lines come in, commands change what answers, answers stream out."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace

import typer
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from peft_dynamic.cli._given import ranks_of
from peft_dynamic.cli._interrupt import Interrupted, Interruption
from peft_dynamic.cli._talk import Answer, Ask, Limits, Message, Talker

HELP = """/rank 4        answer at rank 4
/depth 15      run the first 15 layers; /depth all for all of them
/base          answer as the base model
/compare 2,8   several ranks side by side; 0 is the base model
/reset         forget the conversation
/help          this
/exit          end; so does Ctrl-D, or Ctrl-C twice"""


class Chat:
    """A conversation with each of the columns, which stand side by side.

    Args:
        talker: the model.
        columns: the rank of each; None for the base model.
        limits: how answers are made.
        system: the system message, or None.
        instruction: a line to put before each prompt, or None.
    """

    def __init__(
        self, talker: Talker, columns: list[int | None], limits: Limits, system: str | None, instruction: str | None
    ) -> None:
        self.talker, self.columns, self.limits = talker, columns, limits
        self.system, self.instruction = system, instruction
        self.talks: list[list[Message]] = []  # of each column
        self.console = Console(highlight=False)
        self.commands: dict[str, Callable[[str], str | None]] = {
            "/rank": self.rank,
            "/depth": self.depth,
            "/base": lambda _: self.show([None]),
            "/compare": self.compare,
            "/reset": self.reset,
            "/help": lambda _: HELP,
        }
        self.reset("")

    # --- lines

    def run(self) -> None:
        """Answer until the lines end."""
        self.say(f"{self.state()}. /help has the commands.")
        interruption = Interruption()
        again = 0.0  # until when another Ctrl-C ends the chat
        with interruption.watched():
            lines = self.lines()
            while True:
                try:
                    line = next(lines, None)
                    if line is None or line.split()[0] in ("/exit", "/quit"):
                        return
                    self.take(line)
                    again = 0.0
                except Interrupted:
                    now = time.monotonic()
                    if interruption.number == signal.SIGTERM or now < again:
                        raise
                    again = now + 2
                    self.say("\nStopped. Ctrl-C again ends the chat.")
                    lines = self.lines()  # the interrupted one is over

    def lines(self) -> Iterator[str]:
        """What is typed, or comes through a pipe, without empty lines."""
        typed = sys.stdin.isatty()
        if typed:
            with suppress(ImportError):
                import readline  # noqa: F401  # lets a line be edited
        while True:
            if typed:
                try:
                    line = input("> ")
                except EOFError:
                    return
            else:
                line = sys.stdin.readline()
                if not line:
                    return
            if line := line.strip():
                if not typed:
                    self.console.print(f"> {line}", markup=False)
                yield line

    def take(self, line: str) -> None:
        """Do what a line says."""
        if not line.startswith("/"):
            self.answer(line)
            return
        word, _, rest = line.partition(" ")
        command = self.commands.get(word)
        if command is None:
            self.say(f"{word}: no such command. /help has them.")
            return
        try:
            said = command(rest.strip())
        except (ValueError, typer.BadParameter) as error:
            said = " ".join(str(error).split())
        self.say(said or f"{self.state()}.")

    def say(self, text: str) -> None:
        """A line of the chat's own."""
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    # --- commands

    def state(self) -> str:
        """What answers now."""
        exit, depth = self.limits.exit, self.talker.depth
        where = f", {exit or depth} of {depth} layers" if depth else ""
        return f"{' | '.join(map(name_of, self.columns))}{where}"

    def show(self, columns: list[int | None]) -> None:
        """Other columns, which go on with the conversation of the first."""
        self.columns, self.talks = columns, [list(self.talks[0]) for _ in columns]

    def rank(self, text: str) -> None:
        """One rank."""
        if not text.isdecimal():
            raise ValueError(f"/rank {text}: must be a whole number, such as /rank {self.talker.largest}.")
        self.talker.check_rank(int(text))
        self.show([int(text)])

    def compare(self, text: str) -> None:
        """Several."""
        columns = ranks_of(text, "/compare")
        for rank in columns:
            if rank is not None:
                self.talker.check_rank(rank)
        self.show(columns)

    def depth(self, text: str) -> None:
        """How many layers run."""
        exit = None
        if text != "all":
            if not text.isdecimal():
                raise ValueError(f"/depth {text}: must be a whole number of layers, or all.")
            self.talker.check_exit(int(text))
            exit = int(text)
        self.limits = replace(self.limits, exit=exit)

    def reset(self, _: str) -> str:
        """Nothing has been said."""
        start: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self.talks = [list(start) for _ in self.columns]
        return "The conversation begins anew."

    # --- answers

    def answer(self, line: str) -> None:
        """Ask all columns; what was said before Ctrl-C stays a part of the conversation."""
        content = f"{self.instruction}\n{line}" if self.instruction else line
        asks = [
            Ask([*talk, {"role": "user", "content": content}], rank)
            for talk, rank in zip(self.talks, self.columns, strict=True)
        ]
        answers: list[Answer] = []
        try:
            with closing(self.talker.stream(asks, self.limits)) as stream:
                shown = self.one(stream, answers) if len(asks) == 1 else self.several(stream, answers)
                for _ in shown:
                    pass
        except ValueError as error:
            self.say(" ".join(str(error).split()))
            return
        finally:
            if answers:
                said = [{"role": "assistant", "content": answer.text} for answer in answers]
                self.talks = [[*ask.messages, text] for ask, text in zip(asks, said, strict=True)]

    def one(self, stream: Iterator[list[Answer]], answers: list[Answer]) -> Iterator[None]:
        """One answer, as it comes."""
        done = 0
        for new in stream:
            answers[:] = new
            self.console.print(new[0].text[done:], end="", markup=False, soft_wrap=True)
            done = len(new[0].text)
            yield
        self.console.print()
        self.say(f"{name_of(self.columns[0])}: {answers[0].speed}")

    def several(self, stream: Iterator[list[Answer]], answers: list[Answer]) -> Iterator[None]:
        """Side by side in a terminal, one below the other elsewhere."""
        if not self.console.is_terminal:
            for new in stream:
                answers[:] = new
                yield
            for rank, answer in zip(self.columns, answers, strict=True):
                self.console.print(f"[{name_of(rank)}] {answer.text}", markup=False, soft_wrap=True)
                self.say(f"{name_of(rank)}: {answer.speed}")
            return
        with Live(console=self.console, refresh_per_second=8, vertical_overflow="visible") as live:
            for new in stream:
                answers[:] = new
                live.update(self.panels(answers))
                yield

    def panels(self, answers: list[Answer]) -> Columns:
        """The answers in frames."""
        width = max(20, self.console.width // len(answers) - 1)
        frames = [
            Panel(Text(answer.text), title=name_of(rank), subtitle=answer.speed, width=width)
            for rank, answer in zip(self.columns, answers, strict=True)
        ]
        return Columns(frames)


def name_of(rank: int | None) -> str:
    """As it is called in the reports."""
    return "base model" if rank is None else f"rank {rank}"
