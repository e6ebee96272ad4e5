"""The command's edge: what may reach the terminal. No traceback, and none of the hosts' talk that a user can't act on.

`PEFT_DYNAMIC_DEBUG=1` shows all of it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from peft_dynamic._extras import how_to_install
from peft_dynamic.cli._interrupt import Interrupted, Interruption

# typer brings its own copy of click in some releases: the class is found from what typer exports in all of them
ClickException: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class UserError(RuntimeError):
    """Something that only shows on the way; the message says what to do."""


def debugging() -> bool:
    """Whether tracebacks and the hosts' warnings are wanted."""
    return os.environ.get("PEFT_DYNAMIC_DEBUG", "") not in ("", "0")


def reason(error: BaseException) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split())
    text = f"{text[:300]}..." if len(text) > 300 else text.removesuffix(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def blame(what: str, fix: str) -> Iterator[None]:
    """Whatever a host raises inside the block is the fault of `what`, a file or an option; `fix` says what to do.

    Raises:
        UserError: in place of the host's error.
    """
    try:
        yield
    except (UserError, ClickException, typer.Exit, typer.Abort):
        raise
    except Exception as error:  # a damaged file raises anything: KeyError, RecursionError, zipfile's errors, ...
        raise UserError(f"{what}: {reason(error)}. {fix}") from error


def require_package(name: str, what: str, extra: str) -> None:
    """Stop unless a package is there.

    Raises:
        UserError: it is missing; the message says how to install it.
    """
    if not has_package(name):
        raise UserError(f"{what} needs {name}. {how_to_install(extra, name)}")


def has_package(name: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what it is a part of
        return False
    except ValueError:  # in sys.modules without a spec
        return name in sys.modules


@contextmanager
def hosts_hushed() -> Iterator[None]:
    """Inside, warnings of this package are lines on stderr, and the hosts' warnings, logs and bars are not shown."""
    if debugging():
        yield
        return
    # for what is imported later, and for child processes
    variables = {"TRANSFORMERS_VERBOSITY": "error", "BITSANDBYTES_NOWELCOME": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if not sys.stderr.isatty():
        variables["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    loggers = {name: logging.getLogger(name).level for name in ("bitsandbytes", "peft", "accelerate", "torch")}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    deepspeed = logging.getLogger("DeepSpeed")  # which sets its own level when it is imported, and writes to stdout
    deepspeed.addFilter(_is_error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=UserWarning, module=r"peft_dynamic(\.|$)")
            warnings.showwarning = _show
            yield
    finally:
        deepspeed.removeFilter(_is_error)
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
        for name in added:
            os.environ.pop(name, None)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"Warning: {message}", err=True)


class Edge(TyperGroup):
    """The command with its verbs: an error is one message and an exit code, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        interruption = Interruption()  # of verbs that do not watch for themselves: what they began goes away
        try:
            with interruption.watched(), hosts_hushed():
                return super().invoke(ctx)
        except Interrupted as stop:
            typer.echo("Stopped. Nothing is left half done.", err=True)
            raise typer.Exit(128 + (interruption.number or signal.SIGINT)) from stop
        except (ClickException, typer.Exit, typer.Abort, BrokenPipeError):
            raise  # typer's own, which it prints
        except UserError as error:
            if debugging():
                raise
            message = str(error)
        except Exception as error:
            if debugging():
                raise
            message = (
                f"{reason(error)}\nThis was not foreseen. PEFT_DYNAMIC_DEBUG=1 shows where it came from; "
                "if your files are in order, please report it."
            )
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(1)
