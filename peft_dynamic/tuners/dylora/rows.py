"""Requests of one batch at ranks of their own: `model.generate(**inputs, ranks=[2, 8, 32])`.

Notable: rank b of an adapter is a mask in the right basis. Where A and B are in the basis of the singular components
(truncation="svd"), or as they are stored ("prefix"), a row at rank b keeps the first b numbers of its z = A x, times
scale(b) over the scale in use. So one pair of products serves all rows, at the cost of the largest rank among them.
With a mixer under "prefix" the mask is M[:b, :b], which z = A x is multiplied with.

PEFT passes `adapter_names` of a batch to its layers in `PeftModel._enable_peft_forward_hooks`, which every `forward`
and `generate` of a `PeftModel` enters. `ranks` comes in at the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Linear
from torch import nn

from peft_dynamic.functional.ranks import alpha_at
from peft_dynamic.tuners.dylora.layer import ranked_layers
from peft_dynamic.tuners.dylora.model import adapters_with_ranks, held, ranks_of_layers, schedules_of
from peft_dynamic.tuners.dylora.ranks import AdapterRanks, find_bases
from peft_dynamic.tuners.dylora.schedule import warn_if_untrained
from peft_dynamic.tuners.dylora.turns import turn

CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)
QUANTIZED = {"Linear4bit", "Linear8bitLt"}  # of bitsandbytes: the backends that were tried
TIME_FIRST = {"fsmt", "xlnet"}  # whose layers see (length, batch, features)

Rank = int | dict[str, int] | None


class Batch:
    """How many rows the layers see.

    Args:
        ranks: one of each row that was passed in.

    Attributes:
        copies: how many of each row there are, one after the other: beams, or sequences to return.
    """

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.ranks = list(ranks)
        self.copies = 1

    def check(self, seen: torch.Tensor, module: str) -> None:
        """Raise ValueError unless there is a rank for each row."""
        if seen.dim() >= 2 and len(seen) == len(self.ranks) * self.copies:
            return
        copies = f", times {self.copies} for beams or returned sequences" if self.copies > 1 else ""
        raise ValueError(
            f"ranks={self.ranks!r} are {len(self.ranks)}{copies}, and {module} sees {len(seen)} rows. Pass one rank "
            "for each row of the batch. A module that sees the tokens of all rows in one list has no rows: a router, "
            "or an expert."
        )


class RowCut:
    """What the rows keep of z = A x in one layer; called with z, (rows, ..., b), for a convolution (rows, b, ...).

    Args:
        module: for messages.
        weights: (n, b), what each row's components are multiplied with; or (n, b, b), the matrix to multiply z with.
        batch: which has n rows, or a multiple.
        channels_first: of a convolution.
    """

    def __init__(self, module: str, weights: torch.Tensor, batch: Batch, channels_first: bool) -> None:
        self.module, self.weights, self.batch, self.channels_first = module, weights, batch, channels_first
        self._made: tuple[Any, torch.Tensor] | None = None

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("ranks: rows at ranks of their own are not compiled. Use the model as it was before.")
        self.batch.check(z, self.module)
        place = 1 if self.channels_first else z.dim() - 1
        weights = self._weights_for(z)
        if z.shape[place] != weights.shape[-1]:
            raise RuntimeError(
                f"ranks: the rank of {self.module} was changed while rows have ranks of their own. Call set_rank, "
                "at_rank or calibrate before or after."
            )
        if weights.dim() == 2:
            shape = [len(z), *(1 for _ in z.shape[1:])]
            shape[place] = weights.shape[-1]
            return z * weights.view(shape)
        tokens = z.movedim(place, -1)
        return (tokens.reshape(len(z), -1, weights.shape[-1]) @ weights.mT).view(tokens.shape).movedim(-1, place)

    def _weights_for(self, z: torch.Tensor) -> torch.Tensor:
        key = (z.dtype, z.device, self.batch.copies)
        if self._made is None or self._made[0] != key:
            self._made = key, self.weights.repeat_interleave(self.batch.copies, 0).to(z.device, z.dtype)
        return self._made[1]


def row_weights(state: AdapterRanks, ranks: Sequence[int]) -> torch.Tensor:
    """The `weights` of `RowCut` for a layer that computes at the largest of these ranks.

    Args:
        state: of the layer.
        ranks: of the layer at each row, 0 for none.
    """
    most = max([1, *ranks])
    scales = [_unit_scale(state, rank) / _unit_scale(state, most) if rank else 0.0 for rank in ranks]
    mixer = state.parts[0][2].mixer
    device = state.factors()[0].device
    if mixer is None or state.truncation == "svd":
        kept = torch.arange(most) < torch.tensor(ranks)[:, None]
        return (kept * torch.tensor(scales, dtype=torch.float64)[:, None]).to(device)
    weights = []
    for rank, scale in zip(ranks, scales, strict=True):
        part = mixer.value[0, :rank, :rank] * scale
        weights.append(nn.functional.pad(part, (0, most - rank, 0, most - rank)))
    return torch.stack(weights).to(device)


def _unit_scale(state: AdapterRanks, rank: int) -> float:
    return alpha_at(state.rule, 1.0, rank, state.max_rank) / rank


@contextmanager
def row_ranks(model: Any, ranks: Sequence[Rank], adapter_name: str | None = None) -> Iterator[Batch]:
    """Inside the block each row of a batch is at the rank of its place in `ranks`.

    Args:
        model: the model with DyLoRA or LoRA adapters, in eval mode.
        ranks: for each row what `set_rank` takes: a rank, or a budget from module names to ranks, where a module that
            it does not name is at the set rank. 0 or None is the base model alone.
        adapter_name: the adapter, or None for every active one that `set_rank` would set.

    Yields:
        The batch, whose `copies` are 1.

    Raises:
        ValueError: there are no such ranks, the model trains, is merged or disabled, or a module has no rows; the
            message has its name.
        TypeError: `ranks` is no list of ranks.
    """
    batch = Batch(_listed(ranks))
    try:
        names = adapters_with_ranks(model, adapter_name)
    except ValueError as error:
        kinds = sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()})
        raise ValueError(f"ranks={batch.ranks!r}: {error} Its adapters are of type {', '.join(kinds)}.") from error
    with held(model, names), turn(schedules_of(model, names)), ExitStack() as stack:
        layers: dict[str, dict[str, Any]] = {name: dict(ranked_layers(model, name)) for name in names}
        each = [(name, module, layer) for name in names for module, layer in layers[name].items()]
        _check_model(model, batch, names)
        for name, module, layer in each:
            _check_layer(layer, name, module, batch)
        wanted = {name: _wanted(model, name, layers[name], batch.ranks) for name in names}
        for name, module, layer in each:
            stack.enter_context(_at(layer, name, wanted[name][module], batch))
        states = [layer.lora_views[name] for name, _, layer in each]
        find_bases(state for state in states if state.rotated and state.in_use and state.is_out_of_date())
        yield batch


def _listed(ranks: Any) -> list[Rank]:
    listed = ranks.tolist() if hasattr(ranks, "tolist") else ranks
    if not isinstance(listed, list | tuple):
        raise TypeError(
            f"ranks={ranks!r}: must be a list with a rank for each row of the batch. For one rank use set_rank or "
            "`with model.at_rank(rank):`."
        )
    if not listed:
        raise ValueError("ranks=[]: must have a rank for each row of the batch.")
    return list(listed)


def _wanted(model: Any, adapter_name: str, layers: dict[str, Any], ranks: Sequence[Rank]) -> dict[str, list[int]]:
    """Module name -> the rank of the adapter there at each row."""
    schedule = next(iter(layers.values())).lora_views[adapter_name].schedule
    found: dict[str, list[int]] = {module: [] for module in layers}
    for rank in ranks:
        if rank is None or (not isinstance(rank, bool) and rank == 0):
            asked = dict.fromkeys(layers, 0)
        else:
            set_now = {module: layer.lora_views[adapter_name].asked for module, layer in layers.items()}
            asked = set_now | ranks_of_layers(model, rank, adapter_name, layers)
        for module, value in asked.items():
            warn_if_untrained(schedule, value)
            found[module].append(value)
    return found


@contextmanager
def _at(layer: Any, adapter_name: str, asked: Sequence[int], batch: Batch) -> Iterator[None]:
    """One layer's part of it, taken back at the end."""
    state: AdapterRanks = layer.lora_views[adapter_name]
    factor = state.parts[0][2]
    before = state.in_use, state.mixed_rows, factor.rows
    shown = layer.r[adapter_name], layer.lora_alpha[adapter_name], layer.scaling[adapter_name]
    ranks = [state.of(rank) for rank in asked]
    weights = row_weights(state, ranks)
    try:
        state.use(layer, adapter_name, max(ranks))
        per_alpha = shown[2] / (shown[1] / shown[0]) if shown[1] else 1.0  # a factor of scale_layer's
        layer.scaling[adapter_name] = layer.lora_alpha[adapter_name] / layer.r[adapter_name] * per_alpha
        state.mixed_rows = True
        factor.rows = RowCut(state.name, weights, batch, isinstance(layer, CONVOLUTIONS))
        yield
    finally:
        state.in_use, state.mixed_rows, factor.rows = before
        layer.r[adapter_name], layer.lora_alpha[adapter_name], layer.scaling[adapter_name] = shown


# --- what has no rows, or more than rows


def _check_model(model: Any, batch: Batch, names: Sequence[str]) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in TIME_FIRST:
        raise _refused(batch, f"the layers of {kind} have the rows of a batch in their second dimension")
    if model.training:
        raise _refused(batch, "the model is in training mode, where every step has one rank", "Call model.eval().")
    if all(rank not in (0, None) for rank in batch.ranks):
        return
    base = "Leave the row out, and run it in `with model.disable_adapter():`."
    active = {name for _, layer in ranked_layers(model) for name in layer.active_adapters} - {*names}
    if active:
        raise _refused(batch, f"0 and None are the base model alone, and {sorted(active)} are active beside", base)
    for name in names:
        config = model.peft_config[name]
        more = [key for key in ("modules_to_save", "trainable_token_indices") if getattr(config, key, None)]
        more += ["bias"] * (config.bias != "none")
        if more:
            raise _refused(batch, f"0 and None are the base model alone, and {name!r} has {', '.join(more)} too", base)


def _check_layer(layer: Any, adapter_name: str, module: str, batch: Batch) -> None:
    state: AdapterRanks = layer.lora_views[adapter_name]
    own = next(cls for cls in type(layer).__mro__ if cls.__module__.startswith("peft."))
    linear = isinstance(layer, Linear) or (own.__module__ == "peft.tuners.lora.bnb" and own.__name__ in QUANTIZED)
    if layer.merged:
        raise _refused(batch, f"the adapter is merged into {module}", "Call unmerge_adapter() first.")
    if layer.disable_adapters:
        raise _refused(batch, f"the adapters are disabled, at {module}", "Leave `ranks` out, or enable them.")
    if layer.training:
        raise _refused(batch, f"{module} is in training mode", "Call model.eval().")
    if not (linear or isinstance(layer, CONVOLUTIONS)) or adapter_name not in layer.lora_A:
        raise _refused(batch, f"{module} is a LoRA layer of the kind {own.__name__}, which does not show its rows")
    if state.parts[0][2].divisor > 1:
        raise _refused(batch, f"{module} is a convolution in groups")
    if layer.lora_bias.get(adapter_name, False):
        raise _refused(batch, f"the adapter {adapter_name!r} has a lora_bias, which has no rank")


def _refused(batch: Batch, why: str, fix: str = "Run the ranks one after the other, with at_rank.") -> ValueError:
    return ValueError(f"ranks={batch.ranks!r}: {why}. {fix}")


# --- the argument of PeftModel's `forward` and `generate`


@contextmanager
def _copies_seen(model: Any, batch: Batch) -> Iterator[None]:
    """Inside, transformers' `generate` tells the batch how often it repeats each row, when it does."""
    base = model.get_base_model()
    expand = getattr(base, "_expand_inputs_for_generation", None)
    if expand is None:
        yield
        return

    @wraps(expand)
    def told(*args: Any, expand_size: int = 1, **kwargs: Any) -> Any:
        batch.copies = expand_size
        return expand(*args, expand_size=expand_size, **kwargs)

    before = base.__dict__.get("_expand_inputs_for_generation")
    base.__dict__["_expand_inputs_for_generation"] = told
    try:
        yield
    finally:
        del base.__dict__["_expand_inputs_for_generation"]
        if before is not None:
            base.__dict__["_expand_inputs_for_generation"] = before


@contextmanager
def _with_ranks(stock: Any, model: Any, ranks: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    if kwargs.get("adapter_names") is not None:
        raise ValueError("ranks and adapter_names: a batch takes one of the two. Pass adapter_names without ranks.")
    with row_ranks(model, ranks) as batch, _copies_seen(model, batch), stock(model, *args, **kwargs):
        yield


def _taking_ranks(stock: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's method, which takes `ranks` out of the arguments as it takes `adapter_names`."""

    @wraps(stock)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "ranks" not in kwargs:
            return stock(self, *args, **kwargs)
        self.special_peft_forward_args.add("ranks")
        ranks = kwargs.pop("ranks")
        return stock(self, *args, **kwargs) if ranks is None else _with_ranks(stock, self, ranks, *args, **kwargs)

    vars(call)["of_peft_dynamic"] = True  # a second import of this file wraps nothing twice
    return call


if not hasattr(PeftModel._enable_peft_forward_hooks, "of_peft_dynamic"):
    PeftModel._enable_peft_forward_hooks = _taking_ranks(PeftModel._enable_peft_forward_hooks)
