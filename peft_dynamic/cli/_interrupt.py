"""Ctrl-C and SIGTERM: a training stops after its step, with a checkpoint; anything else stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


class Interrupted(KeyboardInterrupt):
    """The command was told to stop. No Exception, so that no host takes it for a fault of its own."""


class Interruption:
    """What was asked for, and how it is met.

    Attributes:
        number: the signal that came; 0 for none.
        gentle: whether the first signal only sets `number`, for the training to end its step.
    """

    def __init__(self) -> None:
        self.number = 0
        self.gentle = False

    def __bool__(self) -> bool:
        return self.number != 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM come here."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python sets handlers in the main thread alone
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def gently(self) -> Iterator[None]:
        """Inside, the first signal waits for whoever asks for `number`; then it is raised at the end.

        Raises:
            Interrupted: a signal came.
        """
        self.gentle = True
        try:
            yield
        finally:
            self.gentle = False
        if self.number:
            raise Interrupted

    def _handle(self, number: int, frame: Any) -> None:
        first = not self.number
        self.number = number
        if not (self.gentle and first):
            raise Interrupted
        typer.echo("Stopping after this step. Once more to stop at once.", err=True)
