"""Whose turn it is on a model that several threads use: each forward pass runs at the rank that its caller set.

A rank is set on the layers, so one model has one rank at a time. `at_rank` is therefore a turn: a second thread waits
until the first has left its block. What would compute at another's rank without a sign is an error instead: a forward
pass outside of `at_rank` while somebody else is inside, or a second task of the same thread, which cannot wait.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from peft_dynamic.hosts.running import call_frame, is_running, runs_in_thread

# The turns that this thread or task is inside of.
_HELD: ContextVar[frozenset[object]] = ContextVar("turns", default=frozenset())


class _Call(NamedTuple):
    """A forward pass of the whole model."""

    frame: FrameType
    trains: bool
    without_gradients: bool


class Turns:
    """The forward passes of one adapter's model that are running, and the `at_rank` blocks that are open."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.holders: list[tuple[object, int]] = []  # (turn, thread), the innermost last
        self.calls: dict[int, list[_Call]] = {}  # by thread

    def enter_call(self, trains: bool) -> None:
        """A forward pass begins.

        Raises:
            RuntimeError: it would run at the rank of another thread or task.
        """
        me = threading.get_ident()
        if self._is_anothers():
            raise RuntimeError(
                "another thread or task is inside `at_rank` on this model, so this forward pass would run at its rank. "
                "Put it into `with model.at_rank(rank):` too: threads then take turns. Tasks of one thread need a lock "
                "around the block, or a model each."
            )
        others = [call for thread in list(self.calls) if thread != me for call in self._running(thread)]
        if any(trains or call.trains for call in others):
            raise RuntimeError(
                "a training step and another forward pass run on this DyLoRA model in two threads, and a layer has one "
                "rank at a time. Evaluate between the steps, or on a copy; instead of nn.DataParallel start a process "
                "per device."
            )
        mine = [call for call in self.calls.get(me, []) if is_running(call.frame)]
        mine.append(_Call(call_frame(), trains, not torch.is_grad_enabled()))
        self.calls[me] = mine

    def leave_call(self) -> None:
        """It has ended."""
        me = threading.get_ident()
        if mine := self.calls.get(me):
            mine.pop()
        if not mine:
            self.calls.pop(me, None)

    def without_gradients(self) -> bool:
        """Whether this thread is in a forward pass that began without gradients, as generation does."""
        mine = self.calls.get(threading.get_ident())
        return mine is not None and mine[-1].without_gradients and is_running(mine[-1].frame)

    def _running(self, thread: int) -> list[_Call]:
        return [call for call in self.calls.get(thread, []) if runs_in_thread(call.frame, thread)]

    def _is_anothers(self) -> bool:
        return bool(self.holders) and self.holders[-1][0] not in _HELD.get()

    def take(self, turn: object) -> None:
        """Begin a turn, after that of another thread.

        Raises:
            RuntimeError: another task of this thread has it, or another thread computes outside of `at_rank`.
        """
        me = threading.get_ident()
        if self._is_anothers() and self.holders[-1][1] == me:
            raise RuntimeError(
                "another task of this thread is inside `at_rank` on this model, and a model has one rank at a time. "
                "Put an asyncio.Lock around the block, run it in a thread, or give each task a model."
            )
        self.lock.acquire()
        if any(self._running(thread) for thread in list(self.calls) if thread != me):  # stale ones do not count
            self.lock.release()
            raise RuntimeError(
                "another thread runs a forward pass of this model outside of `at_rank`, whose rank would change under "
                "it. Put every thread's calls into `with model.at_rank(rank):`; they then take turns."
            )
        self.holders.append((turn, me))

    def give_back(self, turn: object) -> None:
        """End it."""
        self.holders = [held for held in self.holders if held[0] is not turn]
        self.lock.release()


_TURNS: WeakKeyDictionary[object, Turns] = WeakKeyDictionary()
_making = threading.Lock()


def turns_of(schedule: object) -> Turns:
    """The turns of an adapter. Kept outside of it: locks and frames are neither copied nor saved."""
    found = _TURNS.get(schedule)
    if found is None:
        with _making:
            found = _TURNS.setdefault(schedule, Turns())
    return found


@contextmanager
def turn(schedules: Iterable[object]) -> Iterator[None]:
    """Inside the block no other thread sets these adapters' ranks, or computes with them."""
    mine, taken = object(), []
    try:
        for each in sorted({id(schedule): turns_of(schedule) for schedule in schedules}.items()):  # no deadlock of two
            each[1].take(mine)
            taken.append(each[1])
        _HELD.set(_HELD.get() | {mine})
        yield
    finally:
        _HELD.set(_HELD.get() - {mine})
        for turns in reversed(taken):
            turns.give_back(mine)
