"""A model that answers: several conversations at once, each at a rank of its own, as a stream of text.

Notable: answers of one call are the rows of one batch, by the argument `ranks` of `PeftModel.generate`. Where an
adapter has no such rows (embeddings, a trained head beside the base model), they are answered one after the other.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import torch
import typer
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from peft_dynamic.cli import _load
from peft_dynamic.cli._data import Example
from peft_dynamic.cli._encode import prompt_text
from peft_dynamic.cli._subject import Subject
from peft_dynamic.exits.layers import check_exit, check_exits_work, depth_of, exit_at
from peft_dynamic.hosts.modes import adapters_disabled
from peft_dynamic.tuners.dylora import at_rank
from peft_dynamic.tuners.dylora.rows import row_ranks

Message = dict[str, str]
ANSWER = {"role": "assistant", "content": ""}  # what comes next


@dataclass(frozen=True)
class Ask:
    """One conversation to go on with.

    Attributes:
        messages: as a chat template takes them; the last one is the user's.
        rank: the adapter's; None for the base model alone.
    """

    messages: Sequence[Message]
    rank: int | None


@dataclass
class Answer:
    """What became of it.

    Attributes:
        text: so far.
        tokens: how many were made.
        seconds: from the asking to the last token.
        cut: whether it was stopped, by the user or by the limit of tokens.
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    cut: bool = False

    @property
    def speed(self) -> str:
        """For a line under it."""
        cut = ", stopped" if self.cut else ""
        return f"{self.tokens} tokens, {self.tokens / max(self.seconds, 1e-9):.1f} a second{cut}"


@dataclass(frozen=True)
class Limits:
    """How an answer is made.

    Attributes:
        max_new_tokens: at the most.
        temperature: of the sampling; 0 for the likeliest token each time.
        exit: how many layers run; None for all.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    exit: int | None = None


class _Text:
    """The base model that a chat needs, as `Subject.load` asks for it."""

    def load_base(self, name: str, dtype: Any, settings: dict[str, Any], others: dict[str, Any]) -> Any:
        return _load.load_decoder(name, dtype, settings)


class _Stop(StoppingCriteria):
    """Stops all rows when it is told to."""

    def __init__(self, *told: threading.Event | None) -> None:
        self.told = [event for event in told if event is not None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        told = any(event.is_set() for event in self.told)
        return torch.full((len(input_ids),), told, dtype=torch.bool, device=input_ids.device)


class _Rows(BaseStreamer):
    """transformers' streamer of text for each row of a batch: it has one for one row alone."""

    def __init__(self, tokenizer: Any, rows: int, ends: set[int]) -> None:
        self.rows = [TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) for _ in range(rows)]
        self.tokens, self.ended, self.ends = [0] * rows, [False] * rows, ends
        self.new: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True for each token, False at the end
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            for row in self.rows:
                row.put(value[:1])
            return
        for place, token in enumerate(value.tolist()):
            if not self.ended[place]:  # what follows the end of a row is padding
                self.rows[place].put(value[place : place + 1])
                self.tokens[place] += 1
                self.ended[place] = token in self.ends
        self.new.put(True)

    def end(self) -> None:
        for row in self.rows:
            row.end()

    def said(self, place: int) -> str:
        """What a row has said since the last call."""
        found = ""
        while not self.rows[place].text_queue.empty():
            found += self.rows[place].text_queue.get() or ""  # None is the end
        return found


@dataclass
class Talker:
    """A model with an adapter, ready to answer; several threads take turns.

    Args:
        model: a `PeftModel` over a causal language model.
        tokenizer: its tokenizer.
        largest: the largest rank.

    Attributes:
        mixes: whether one batch can have several ranks and the base model.
        no_exits: why the model cannot be left early; None where it can.
    """

    model: Any
    tokenizer: Any
    largest: int
    mixes: bool = field(init=False)
    no_exits: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.model.eval()
        self._turn = threading.Lock()
        try:
            with row_ranks(self.model, [1, None]):
                self.mixes = True
        except ValueError:
            self.mixes = False
        try:
            check_exits_work(self.model)
        except (ValueError, TypeError, AttributeError) as error:
            self.no_exits = " ".join(str(error).split())

    @property
    def depth(self) -> int | None:
        """How many layers there are, where it can be chosen how many run."""
        return None if self.no_exits else depth_of(self.model)

    def check_rank(self, rank: int) -> None:
        """Raise ValueError for a rank that there is not."""
        if not 1 <= rank <= self.largest:
            raise ValueError(f"rank {rank}: must be from 1 to {self.largest}, the largest rank of the adapter.")

    def check_exit(self, exit: int) -> None:
        """Raise ValueError for a depth that there is not."""
        if self.no_exits:
            raise ValueError(f"depth {exit}: {self.no_exits}")
        check_exit(self.model, exit, "depth")

    def stream(
        self, asks: Sequence[Ask], limits: Limits, stop: threading.Event | None = None
    ) -> Generator[list[Answer], None, None]:
        """The answers as they grow, in the order of what was asked; each time the same list.

        The end of the iteration, also by `close()` or an exception, stops the model. Another thread waits for it.
        """
        answers = [Answer() for _ in asks]
        groups = [list(range(len(asks)))] if self.mixes else [[place] for place in range(len(asks))]
        with self._turn:
            for places in groups:
                if stop is not None and stop.is_set():
                    return
                with closing(self._group([asks[i] for i in places], [answers[i] for i in places], limits, stop)) as new:
                    for _ in new:
                        yield answers

    def _group(
        self, asks: list[Ask], answers: list[Answer], limits: Limits, stop: threading.Event | None
    ) -> Generator[None, None, None]:
        """A batch; yields at each token, once `answers` are brought up to it."""
        inputs, room = self._inputs(asks)
        streamer, failed = _Rows(self.tokenizer, len(asks), self._ends()), []
        over = threading.Event()
        halt = _Stop(over, stop)
        begun = time.perf_counter()

        def make() -> None:
            try:
                self._generate(inputs, asks, room, limits, streamer, halt)
            except BaseException as error:
                failed.append(error)
            finally:
                streamer.new.put(False)

        def take() -> None:
            for place, answer in enumerate(answers):
                answer.text += streamer.said(place)
                if streamer.tokens[place] != answer.tokens:
                    answer.tokens, answer.seconds = streamer.tokens[place], time.perf_counter() - begun
                answer.cut = not streamer.ended[place]

        thread = threading.Thread(target=make, daemon=True)
        thread.start()
        try:
            while streamer.new.get():
                take()
                yield
        finally:
            over.set()
            thread.join()
        if failed:
            raise failed[0]
        take()
        yield

    def _inputs(self, asks: list[Ask]) -> tuple[dict[str, torch.Tensor], int]:
        """Tokens, padded on the left, and how many more the model has room for."""
        rows = [Example([*ask.messages, ANSWER], (len(ask.messages),), where="the conversation") for ask in asks]
        texts = [prompt_text(row, self.tokenizer) for row in rows]
        template = bool(getattr(self.tokenizer, "chat_template", None))  # which writes its own special tokens
        made = self.tokenizer(
            texts, padding=True, padding_side="left", add_special_tokens=not template, return_tensors="pt"
        ).to(_load.device(self.model))
        limit = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        if (room := limit - made["input_ids"].shape[1]) < 1:
            raise ValueError(
                f"the conversation has {made['input_ids'].shape[1]} tokens, and the model takes {limit}. Begin anew."
            )
        return {name: made[name] for name in ("input_ids", "attention_mask")}, room

    def _ends(self) -> set[int]:
        """The tokens that end an answer: the model's, and the one that training puts there."""
        found = self.model.generation_config.eos_token_id
        ends = {found} if isinstance(found, int) else {*(found or ())}
        return ends | {self.tokenizer.eos_token_id} - {None}

    def _generate(
        self, inputs: dict[str, torch.Tensor], asks: list[Ask], room: int, limits: Limits, streamer: _Rows, halt: _Stop
    ) -> None:
        ranks = [ask.rank for ask in asks]
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if limits.temperature:
            how = {"do_sample": True, "temperature": limits.temperature}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_load.autocast(self.model, self.model.dtype))
            if limits.exit is not None:
                stack.enter_context(exit_at(self.model, limits.exit))
            if self.mixes:
                how["ranks"] = ranks
            elif ranks[0] is None:
                stack.enter_context(adapters_disabled(self.model))
            else:
                stack.enter_context(at_rank(self.model, ranks[0]))
            self.model.generate(
                **inputs,
                **how,
                max_new_tokens=min(limits.max_new_tokens, room),
                eos_token_id=sorted(self._ends()) or None,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([halt]),
            )


# --- what a command is given


def load_talker(found: Subject) -> Talker:
    """The adapter on its base model, ready to answer.

    Raises:
        typer.BadParameter: the adapter is of another base model.
        UserError: something does not load.
    """
    model, tokenizer = found.load(_Text(), _load.fast_dtype(), stock=not found.ranked)
    if tokenizer.pad_token is None:
        raise typer.BadParameter(
            f"the tokenizer of {found.base} has no end token, so that no batch can be padded.", param_hint="--model"
        )
    return Talker(model, tokenizer, found.largest)
