"""Leaving a model at an earlier layer: for the length of a block, or for good as a smaller checkpoint.

Inside `exit_at` the model's list of layers and its configuration show the first k layers and no others, so that its own
forward pass and transformers' `generate` (masks, cache and all) run as they do on a model of k layers. No architecture
needs code of its own. What an architecture does with its layers beside running them one after another is seen in a
trial with three tokens, which the first exit of each model makes before it changes anything.

The hidden layers stay registered: `model.eval()`, `set_adapter`, `set_rank` or `.to()` reach them as ever.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from peft_dynamic.hosts.blocks import base_model
from peft_dynamic.hosts.decoder import Decoder, find_decoder
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.hosts.probe import alike, trial, trial_logits
from peft_dynamic.hosts.quantization import quantized_layers

# What configurations call their lists with one item per layer.
_PER_LAYER = re.compile(r"layer|block|_types$|windows$|heads|intermediate_size")
PAPER_EXITS = 8


class _Window(nn.ModuleList):
    """A list of layers of which iteration, length and items show only those from `first` to before `end`."""

    first: int
    end: int

    def __iter__(self) -> Iterator[nn.Module]:
        return islice(self._modules.values(), self.first, self.end)

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


class _View:
    """Which layers a model shows, and what it shows when no block is open."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.layers = decoder.layers
        self.depth = len(self.layers)
        self.own_class = type(self.layers)
        self.window_class = type(self.own_class.__name__, (_Window, self.own_class), {})
        configs = (decoder.stack.config, decoder.model.config.get_text_config(decoder=True))
        self.configs: list[Any] = list({id(config): config for config in configs}.values())
        self.lists = [(config, name, value) for config in self.configs for name, value in _lists(config, self.depth)]
        self.blocks: list[Shown] = []

    def update(self) -> None:
        """Show what the block that was opened last wants to be seen."""
        first, end = (self.blocks[-1].first, self.blocks[-1].end) if self.blocks else (0, self.depth)
        self.layers.__class__ = self.window_class if self.blocks else self.own_class
        if self.blocks:
            self.layers.first, self.layers.end = first, end  # type: ignore[assignment]  # numbers on a module
        else:
            del self.layers.first, self.layers.end
        for config in self.configs:
            config.num_hidden_layers = end - first
        for config, name, value in self.lists:
            setattr(config, name, value[first:end])


class Shown:
    """The layers that one open block shows of a model; `show` changes them.

    Attributes:
        decoder: the model's parts.
        layers: all of its layers.
        depth: how many of them were to be seen when the block was opened.
    """

    def __init__(self, view: _View) -> None:
        self._view = view
        self.decoder = view.decoder
        self.layers = list(view.layers._modules.values())
        self.depth: int = view.blocks[-1].end if view.blocks else view.depth
        self.first = 0
        self.end: int = self.depth

    def show(self, first: int, end: int) -> None:
        """Let the model see its layers first, ..., end-1 and no others."""
        self.first, self.end = first, end
        self._view.update()


_VIEWS: WeakKeyDictionary[nn.Module, _View] = WeakKeyDictionary()
_TRIED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def shown_layers(model: nn.Module) -> Iterator[Shown]:
    """A block in which `show` says which layers a model has; blocks may be nested and may end in any order."""
    view = _view(model)
    block = Shown(view)
    stack = view.decoder.stack
    _VIEWS[stack] = view
    view.blocks.append(block)
    try:
        view.update()
        yield block
    finally:
        view.blocks.remove(block)
        view.update()
        if not view.blocks:
            del _VIEWS[stack]


@contextmanager
def exit_at(model: Any, exit: int) -> Iterator[Any]:
    """Leave the model after its first layers, inside the block.

    There the forward pass and `generate` compute what a model cut down to these layers computes:
    head(norm(output of layer `exit`)), with a cache of that many layers. Afterwards, also after an error, the model and
    its configuration are what they were. Blocks may be nested; the innermost counts.

    Weights, adapters and modes set inside the block are set for all layers, hidden ones too. To save a smaller
    checkpoint use `truncate_to_exit`, not this.

    Args:
        model: a causal language model of transformers, or a `PeftModel` over one.
        exit: how many layers run, from 1 to all of them.

    Yields:
        The model.

    Raises:
        TypeError: `exit` is no whole number.
        ValueError: there is no such layer, or the architecture cannot be left early; nothing was changed then.
    """
    check_exit(model, exit)
    check_exits_work(model)
    with shown_layers(model) as block:
        block.show(0, exit)
        yield model


def evenly_spaced(count: int, depth: int) -> list[int]:
    """`count` depths from 3/10 of `depth` to `depth`, rounded half up, each once: 12, 16, ..., 40 for eight of 40."""
    steps = max(1, count - 1)
    depths = {(depth * (3 * steps + 7 * i) + 5 * steps) // (10 * steps) for i in range(steps + 1)}
    return sorted(max(1, k) for k in depths) if count > 1 else [depth]


def depth_of(model: nn.Module) -> int:
    """How many layers a model has, whatever an open block shows of it."""
    return _view(model).depth


def check_exit(model: nn.Module, exit: int, name: str = "exit") -> None:
    """Refuse what is no exit of this model."""
    if isinstance(exit, bool) or not isinstance(exit, int):
        raise TypeError(f"{name}={exit!r}: must be a whole number, the number of layers to run.")
    depth = depth_of(model)
    if not 1 <= exit <= depth:
        raise ValueError(f"{name}={exit}: the model has {depth} layers, so an exit is a number from 1 to {depth}.")


def check_exits_work(model: nn.Module) -> None:
    """Leave the model after half of its layers, once, and compare that with the state there of the whole model.

    Raises:
        ValueError: they differ; the message names the architecture and what was seen.
    """
    view = _view(model)
    decoder = view.decoder
    if decoder.stack in _TRIED:
        return
    with evaluating(decoder.model), shown_layers(model) as block:
        block.show(0, view.depth)
        middle = view.depth // 2
        ran, states, _ = trial(decoder)
        if ran != list(range(view.depth)):
            raise _refused(decoder, f"its {view.depth} layers run in the order {ran}, not one after another")
        block.show(0, middle)
        try:
            ran, _, logits = trial(decoder)
        except Exception as error:
            raise _refused(decoder, f"with {middle} of its {view.depth} layers it fails ({error!r})") from error
        if ran != list(range(middle)):
            raise _refused(decoder, f"with {middle} of its {view.depth} layers it runs the layers {ran}")
        if not alike(decoder.logits(states[middle - 1]), logits):
            raise _refused(decoder, f"with {middle} layers its logits are not head(norm(output of layer {middle}))")
    _TRIED.add(decoder.stack)


def truncate_to_exit(model: Any, exit: int) -> Any:
    """A model of its own with the first layers, the final norm and the head; an ordinary one for transformers.

    `truncate_to_exit(model, 12).save_pretrained(path)` writes a checkpoint that `AutoModelForCausalLM.from_pretrained`
    loads without this package and that computes what the model computes inside `exit_at(model, 12)`. Lists in the
    configuration with an item per layer are cut too. Before it is returned, the model is built anew from its
    configuration, as a load would build it, and the logits are compared.

    Args:
        model: a causal language model of transformers, or a `PeftModel` over one, whose active adapters are merged into
            the copy (up to rounding).
        exit: how many layers to keep.

    Returns:
        The smaller model, a copy that shares no weights with `model`.

    Raises:
        TypeError: `exit` is no whole number.
        ValueError: there is no such layer, the architecture cannot be cut, the model is quantised, or its adapter
            cannot be merged.
    """
    check_exit(model, exit)
    view = _view(model)
    kind = type(view.decoder.model).__name__
    if quantized_layers(view.decoder.model):
        raise ValueError(
            f"model: the {kind} is quantised, and a cut copy of it could not be checked. Load it in float or bfloat16."
        )
    configs: Any = getattr(model, "peft_config", {}) if hasattr(model, "get_base_model") else {}
    if any(config.is_prompt_learning for config in configs.values()):
        raise ValueError("model: a prompt cannot be merged into weights. Use exit_at(model, exit) in its place.")
    check_exits_work(model)
    own = view.layers
    with exit_at(model, exit):
        view.decoder.stack._modules[view.decoder.layers_name] = nn.ModuleList(islice(own._modules.values(), exit))
        try:
            small = copy.deepcopy(model)
        finally:
            view.decoder.stack._modules[view.decoder.layers_name] = own
    if configs:
        try:
            small = small.merge_and_unload(safe_merge=True)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"model: its adapter {model.active_adapter!r} cannot be merged, and an ordinary checkpoint has no "
                f"place for it ({error}). Use exit_at(model, {exit}) in its place."
            ) from error
    vars(small).pop("forward", None)  # TRL's, which would run the original
    _check_rebuilds(small)
    return small


def _check_rebuilds(small: Any) -> None:
    """Compare with a model that is made from the configuration alone and given the same tensors."""
    kind = type(small).__name__
    try:
        config = type(small.config).from_dict(small.config.to_dict())
        config._attn_implementation = small.config._attn_implementation
        with torch.device("meta"):
            anew = type(small)(config)
        anew.load_state_dict(small.state_dict(), assign=True)
    except Exception as error:
        raise ValueError(
            f"model: a {kind} of {small.config.num_hidden_layers} layers cannot be made from the configuration alone "
            f"({error}). Use exit_at in its place."
        ) from error
    for name, value in small.named_buffers():
        owner, _, leaf = name.rpartition(".")
        anew.get_submodule(owner)._buffers[leaf] = value
    with evaluating(small), evaluating(anew):
        if not alike(trial_logits(small), trial_logits(anew)):
            raise ValueError(
                f"model: {kind} computes its layers by their number, so a smaller checkpoint would compute other "
                "logits. Use exit_at in its place."
            )


def _view(model: nn.Module) -> _View:
    base = base_model(model)
    open_view = _VIEWS.get(base.get_decoder()) if hasattr(base, "get_decoder") else None
    return open_view or _View(find_decoder(model))


def _lists(config: Any, depth: int) -> Iterator[tuple[str, list[Any] | tuple[Any, ...]]]:
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == depth and _PER_LAYER.search(name):
            yield name, value


def _refused(decoder: Decoder, reason: str) -> ValueError:
    return ValueError(
        f"{type(decoder.model).__name__} cannot be left at an earlier layer: {reason}. The families that work are "
        "listed in docs/exit-early.md."
    )
