"""Running a model in sections of layers, deeper ones later and only if they are needed, with one exact cache.

A model is cut at its exits into sections. A section takes the states that the section before has put out and that it
has not seen, any number of tokens at once, and runs the model's own forward pass over them with no other layers to be
seen: to the model this is an ordinary call with a cache, whose length is that of this section. So masks, positions and
the head's scaling are the model's own, and a token that skipped a section is filled in later with exactly the states it
would have had: what a layer computes for a token depends on that token's input and on the tokens before it alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import DynamicCache

from peft_dynamic.exits.layers import Shown, check_exits_work, depth_of, shown_layers
from peft_dynamic.hosts.blocks import base_model
from peft_dynamic.hosts.decoder import layer_state
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.hosts.probe import alike

_TRIED: WeakSet[nn.Module] = WeakSet()


class _SectionCache(DynamicCache):
    """A cache that, asked for its length, says that of the section that runs.

    Every layer keeps all tokens, also one with a sliding window (the mask hides what is outside), so that tokens can be
    taken back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = 0  # layer of the section that runs

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(max(layer_idx, self.first))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, max(layer_idx, self.first))


class Sections:
    """The state of one generation: its tokens, and how far each section has come.

    Args:
        block: the open block of `shown_layers`.
        ends: the exits, increasing; the last is the model's depth.
        ids: (B, T) tokens of the prompts, padded on the left.
        mask: (B, T), 0 where a prompt is padded; None without padding.

    Attributes:
        ids: (B, T) all tokens so far.
        done: how many tokens each section has seen.
    """

    def __init__(self, block: Shown, ends: Sequence[int], ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        self._block = block
        self._model = block.decoder.model
        self._bounds = list(zip([0, *ends], ends, strict=False))
        self._cache = _SectionCache()
        self._held: list[list[torch.Tensor]] = [[] for _ in ends]  # what waits in front of each section
        self._entering: torch.Tensor | None = None
        self._mask = mask
        accepted = inspect.signature(type(self._model).forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._keeps = "logits_to_keep" in accepted
        self.ids = ids
        self.done = [0] * len(ends)

    def append(self, tokens: torch.Tensor) -> None:
        """Add one token (B,) to each sequence; no section has seen it yet."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)

    def run(self, number: int, keep: int = 1) -> torch.Tensor:
        """Bring a section to where the one before it is, and return logits (B, keep, V) of the last tokens.

        Args:
            number: of the section; the one before it must be ahead of it.
            keep: of how many tokens; 0 means of all that it has run.
        """
        first, end = self._bounds[number]
        start, stop = self.done[number], self.ids.shape[1] if number == 0 else self.done[number - 1]
        assert stop > start
        if number:
            waiting = self._held[number]
            self._entering = waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=1)
            self._held[number] = []
        kwargs: dict[str, Any] = {"logits_to_keep": keep} if self._keeps else {}
        if self._mask is not None:
            kwargs["attention_mask"] = self._mask[:, :stop]
            if self._takes_positions:
                kwargs["position_ids"] = (self._mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:]
        self._block.show(first, end)
        self._cache.first = first
        output = self._model(input_ids=self.ids[:, start:stop], past_key_values=self._cache, use_cache=True, **kwargs)
        self.done[number] = stop
        return output.logits[:, -keep:]

    def take_back(self, kept: Sequence[int], tokens: int) -> None:
        """Keep, of the last `tokens` tokens that every section has seen, only the first kept[row] of each row.

        Rows that keep fewer than the best move to the right and are padded on the left, so that all still end together.
        """
        length = self.done[-1]
        assert {*self.done, self.ids.shape[1]} == {length}
        most = max(kept)
        end = length - (tokens - most)
        shifts = [most - each for each in kept]
        for layer in self._cache.layers:
            layer.keys, layer.values = _shifted(layer.keys, end, shifts), _shifted(layer.values, end, shifts)
        if any(shifts) and self._mask is None:
            self._mask = torch.ones_like(self.ids)
        self.ids = _shifted(self.ids[:, None, :, None], end, shifts)[:, 0, :, 0]
        if self._mask is not None:
            self._mask = self._mask[:, :end].clone()
            for row, shift in enumerate(shifts):
                if shift:
                    self._mask[row] = self._mask[row].roll(shift)
                    self._mask[row, :shift] = 0
        self.done = [end] * len(self.done)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook on a section's first layer: its input is what has been held, whatever the model passes."""
        if self._entering is None:
            return None
        held, self._entering = self._entering, None
        if args:
            return (held, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": held}

    def leave(self, number: int, output: Any) -> None:
        """Hook on a section's last layer: hold its output for the section after."""
        self._held[number + 1].append(layer_state(output))


def _shifted(values: torch.Tensor, end: int, shifts: Sequence[int]) -> torch.Tensor:
    """(B, H, T, D) cut to T = end, each row then moved to the right."""
    values = values[:, :, :end]
    if not any(shifts):
        return values
    values = values.clone()
    for row, shift in enumerate(shifts):
        if shift:
            values[row] = values[row].roll(shift, dims=-2)
    return values


@contextmanager
def in_sections(
    model: Any, ends: Sequence[int], ids: torch.Tensor, mask: torch.Tensor | None = None
) -> Iterator[Sections]:
    """A block in which a model runs in sections, without gradients.

    Raises:
        ValueError: the architecture cannot be left early, cannot run in sections, or has a prompt for an adapter.
    """
    configs: Any = getattr(model, "peft_config", {}) if hasattr(model, "get_base_model") else {}
    if any(config.is_prompt_learning for config in configs.values()):
        raise ValueError(
            "model: its adapter is a trained prompt, which is not a part of the layers. Use exit_at and generate."
        )
    check_exits_work(model)
    _check_sections_work(model)
    with _sections(model, ends, ids, mask) as sections:
        yield sections


@contextmanager
def _sections(model: Any, ends: Sequence[int], ids: torch.Tensor, mask: torch.Tensor | None) -> Iterator[Sections]:
    with torch.no_grad(), shown_layers(model) as block:
        sections = Sections(block, ends, ids, mask)
        layers = block.layers
        handles = []
        for number, end in enumerate(ends[:-1]):
            handles.append(layers[end].register_forward_pre_hook(sections.enter, with_kwargs=True))
            handles.append(
                layers[end - 1].register_forward_hook(lambda _, args, output, n=number: sections.leave(n, output))
            )
        try:
            yield sections
        finally:
            for handle in handles:
                handle.remove()


def _check_sections_work(model: Any) -> None:
    """Run five tokens through sections, the deeper ones later, and compare with the model as a whole; once a model."""
    base = base_model(model)
    if base in _TRIED:
        return
    depth = depth_of(model)
    ends = sorted({max(1, depth // 3), max(1, 2 * depth // 3), depth})
    ids = torch.arange(5, device=base.get_input_embeddings().weight.device)[None]
    with evaluating(base), shown_layers(model) as block:
        block.show(0, depth)
        whole = base(input_ids=ids, use_cache=False).logits
        try:
            with _sections(model, ends, ids[:, :3], None) as sections:
                sections.run(0)
                for token in (3, 4):
                    sections.append(ids[:, token])
                    sections.run(0)
                logits = [sections.run(number, keep=0) for number in range(1, len(ends))][-1]
        except Exception as error:
            raise ValueError(
                f"{type(base).__name__} cannot run its deeper layers later: {error!r}. Use exit_at and generate."
            ) from error
    if not alike(logits, whole):
        raise ValueError(
            f"{type(base).__name__} cannot run its deeper layers later: its layers depend on more than the layer "
            "before and a cache of keys and values. Use exit_at and generate."
        )
    _TRIED.add(base)
