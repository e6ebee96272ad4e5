"""DyLoRA's tuner: PEFT's `LoraModel`, whose layers are made ranked, with `set_rank`, `get_rank` and `at_rank`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn

from peft_dynamic.rules import check_patterns, is_int
from peft_dynamic.tuners.base import ComputedLoraModel
from peft_dynamic.tuners.dylora.config import DyLoRAConfig
from peft_dynamic.tuners.dylora.layer import make_ranked, ranked_adapters, ranked_layers, set_layer_rank
from peft_dynamic.tuners.dylora.ranks import AdapterRanks, prepare
from peft_dynamic.tuners.dylora.schedule import RankSchedule, warn_if_untrained
from peft_dynamic.tuners.dylora.steps import RankedPassHooks
from peft_dynamic.tuners.dylora.stock import adapters_of, hold, release, stock_layers
from peft_dynamic.tuners.dylora.turns import turn
from peft_dynamic.tuners.dylora.weigh import check_svd, weigh
from peft_dynamic.tuners.moments import AdapterMoments, adapter_moments


class DyLoRAModel(ComputedLoraModel):
    """A model with DyLoRA adapters, made by `get_peft_model(model, DyLoRAConfig(...))`.

    In a training forward pass (train mode, gradients on) every layer uses the rank drawn for this optimizer step.
    Everywhere else (eval mode, `generate`, no gradients, merge, export) it uses the rank of `set_rank`.

    Source: Valipour et al., EACL 2023, arXiv 2210.07558; the authors' code huawei-noah/Efficient-NLP, folder DyLoRA.
    """

    method = "DyLoRA"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._register_hooks(model, adapter_name, RankedPassHooks)

    def _make_computed(self, layer: LoraLayer, adapter_name: str, config: DyLoRAConfig) -> None:
        schedule = self._schedule(adapter_name)
        make_ranked(layer, adapter_name, schedule, config)
        self._keep_in_state_dict(schedule, layer, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # PEFT knows the tensors that the model has, and a new one has no moments yet
        for name in RankSchedule.optional_buffers:
            end = f".lora_schedule.{name}"
            for key in [key for key in remapped if key.endswith(end)]:
                remapped[f"{key.removesuffix(name)}{adapter_name}.{name}"] = remapped.pop(key)
        return remapped

    def _new_schedule(self, config: Any) -> RankSchedule:
        return RankSchedule(config)

    def _weighted(self, config: Any, adapter_name: str) -> Any:
        ranks = [layer.r[adapter_name] for _, layer in ranked_layers(self.model, adapter_name)]
        return replace(
            super()._weighted(config, adapter_name),
            r=max(ranks),
            ranks=None,
            rank_sampling="uniform",
            rank_pattern={},
            scaling="alpha/r",
        )

    def set_rank(self, rank: int | dict[str, int], adapter_name: str | None = None) -> None:
        """Use `rank` outside training; see `peft_dynamic.tuners.dylora.set_rank`."""
        set_rank(self.model, rank, adapter_name)

    def get_rank(self, adapter_name: str | None = None) -> int | dict[str, int]:
        """The rank outside training: an int, or a dict from module name to rank where modules differ."""
        return get_rank(self.model, adapter_name)

    def drawn_rank(self, adapter_name: str | None = None) -> int:
        """The rank that the next training step uses; see `peft_dynamic.tuners.dylora.drawn_rank`."""
        return drawn_rank(self.model, adapter_name)

    def calibrate(
        self,
        batches: Iterable[Mapping[str, torch.Tensor]],
        loss: bool = True,
        damping: float = 0.1,
        adapter_name: str | None = None,
    ) -> AdapterMoments:
        """Cut every rank by what the adapter sees of some batches; see `peft_dynamic.tuners.dylora.calibrate`."""
        return calibrate(self.model, batches, loss, damping, adapter_name)

    def at_rank(self, rank: int | dict[str, int], adapter_name: str | None = None) -> Any:
        """`with model.at_rank(rank):` uses that rank inside the block and goes back after it, also on an error."""
        return at_rank(self.model, rank, adapter_name)


def adapters_with_ranks(model: nn.Module, adapter_name: str | None, stock: bool = True) -> list[str]:
    """The named adapter, or the active ones, that have ranks: of DyLoRA, or else of a stock LoRA."""
    known: dict[str, None] = {}
    active: dict[str, None] = {}
    found = [(layer, ranked_adapters(layer)) for _, layer in ranked_layers(model)]
    own = [(layer, [name for name in names if not _is_lora(model, name)]) for layer, names in found]
    names_of_own = {name for _, names in own for name in names}
    found = own
    if stock and (adapter_name not in names_of_own if adapter_name is not None else not _any_active(own)):
        for _, layer in stock_layers(model):
            found.append((layer, [name for name in adapters_of(layer) if _is_lora(model, name)]))
    for layer, ranked in found:
        known.update(dict.fromkeys(ranked))
        active.update(dict.fromkeys(name for name in layer.active_adapters if name in ranked))
    if not known:
        raise ValueError(
            "the model has no DyLoRA adapter, and no LoRA adapter of its own. Add one with get_peft_model(model, "
            "DyLoRAConfig(...)), or pass the PeftModel itself instead of a module around it."
        )
    if adapter_name is None:
        if not active:
            raise ValueError(
                f"no DyLoRA adapter is active. Pass adapter_name, one of {sorted(known)}, or call set_adapter."
            )
        return list(active)
    if adapter_name not in known:
        raise ValueError(
            f"adapter_name={adapter_name!r} is no DyLoRA adapter of the model, and no stock LoRA; it has "
            f"{sorted(known)}."
        )
    return [adapter_name]


def _any_active(found: list[tuple[Any, list[str]]]) -> bool:
    return any(name in layer.active_adapters for layer, names in found for name in names)


def _is_lora(model: Any, name: str) -> bool:
    return getattr(getattr(model, "peft_config", {}).get(name), "peft_type", None) == "LORA"


def active_ranked_adapter(model: nn.Module, adapter_name: str | None = None) -> str:
    """The named adapter with ranks, or the first active one; raises ValueError, with the names there are, for none."""
    return adapters_with_ranks(model, adapter_name)[0]


def ranks_of_layers(
    model: nn.Module, rank: int | dict[str, int], adapter_name: str, layers: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Module name -> rank asked for, checked in whole before anything is changed."""
    layers = dict(ranked_layers(model, adapter_name)) if layers is None else layers
    if isinstance(rank, dict):
        check_patterns(f"rank={rank!r}", rank)
        _check_untied(model, adapter_name, f"rank={rank!r}")
        wanted = {}
        used = set()
        for name in layers:
            key = name if name in rank else get_pattern_key(list(rank), name)  # as get_rank gives them
            if key in rank:
                wanted[name] = rank[key]
                used.add(key)
        unused = sorted(set(rank) - used)
        if unused:
            raise ValueError(
                f"rank={rank!r}: {unused} match no module of the adapter {adapter_name!r}. A key is the end of a "
                f"module's name, or a regular expression, as in rank_pattern; names are like {next(iter(layers))!r}."
            )
    else:
        wanted = dict.fromkeys(layers, rank)
    for name, value in wanted.items():
        ranks = layers[name].lora_views[adapter_name]
        # a cap of rank_pattern holds for one rank for all modules; a rank given to the module itself must fit it
        limit = ranks.max_rank // ranks.per_rank if isinstance(rank, dict) else ranks.schedule.ranks[-1]
        if not is_int(value):
            raise TypeError(f"rank must be an int or a dict of module patterns to ints, got {rank!r}.")
        least = 0 if isinstance(rank, dict) else 1
        if not least <= value <= limit:
            none = "; 0 leaves the module without its update" if isinstance(rank, dict) else ""
            raise ValueError(
                f"rank={value} for {name!r} is outside 1..{limit}, the ranks of adapter {adapter_name!r}{none}."
            )
        wanted[name] = int(value)
    return wanted


def _check_untied(model: Any, adapter_name: str, what: str) -> None:
    """Raise ValueError where two layers share their factors, so that each cannot be cut in its own way."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if getattr(config, "ensure_weight_tying", False):
        raise ValueError(
            f"{what}: the adapter {adapter_name!r} has ensure_weight_tying=True, so that layers share their factors "
            "and have one cut. Pass one rank for all modules, without a calibration."
        )


def set_rank(model: nn.Module, rank: int | dict[str, int], adapter_name: str | None = None) -> None:
    """Use `rank` for evaluation, generation, merging and export from now on; training goes on drawing its own.

    The rank is a setting of the model at hand and is not saved: an adapter holds all its ranks and loads at r.

    Works on a `PeftModel` and on a transformers model with adapters added by `add_adapter` or `load_adapter`.

    A stock LoRA adapter has every rank up to its own too: the leading singular components of its update. Its stored
    factors stay as they are, training and `save_pretrained` go on with the whole adapter, and `export_lora` or
    `resize_adapter` writes the smaller one.

        set_rank(model, 4)

    Args:
        model: the model with DyLoRA or LoRA adapters.
        rank: the rank of all modules, from 1 to r (a module capped by `rank_pattern` uses its cap where that is less);
            or a dict from module names (their ends, or regular expressions, as in `rank_pattern`) to ranks, which
            leaves the modules it does not name as they are. Rank 0, in a dict, leaves a module without its update.
        adapter_name: the adapter, or None for every active one: of DyLoRA, or where none is, every active LoRA.

    Raises:
        ValueError: a rank outside 1..r, a key that matches no module, a merged adapter, or a LoRA that is more than
            a product of two factors (DoRA and other variants). Nothing is changed then.
        TypeError: a rank that is no int.

    Warns once for each rank that a DyLoRA adapter's training never draws.
    """
    names = adapters_with_ranks(model, adapter_name)
    with held(model, names), turn(schedules_of(model, names)):
        before = _asked(model, names)
        try:
            for name in names:
                _apply_rank(model, rank, name)
        except Exception:
            _put_back(before)
            raise


@contextmanager
def held(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Inside the block the layers of these adapters are ranked; those of a stock LoRA are PEFT's again after it."""
    with ExitStack() as stack:
        for name in names:
            stack.callback(release, model, name, hold(model, name))
        yield


def schedules_of(model: nn.Module, names: list[str]) -> list[RankSchedule]:
    """The schedule of each adapter."""
    return [next(layer for _, layer in ranked_layers(model, name)).lora_views[name].schedule for name in names]


def _asked(model: nn.Module, names: list[str]) -> list[tuple[Any, str, int]]:
    """Each layer, the adapter, and the rank that it was asked for."""
    layers = [(layer, name) for name in names for _, layer in ranked_layers(model, name)]
    return [(layer, name, layer.lora_views[name].asked) for layer, name in layers]


def _put_back(before: list[tuple[Any, str, int]]) -> None:
    there = [each for each in before if each[1] in each[0].__dict__.get("lora_views", {})]  # an adapter may be gone
    for layer, name, asked in there:
        if layer.lora_views[name].asked != asked:
            set_layer_rank(layer, name, asked)
    prepare((ranks, ranks.rank) for layer, name, _ in there if (ranks := layer.lora_views[name]))


def _apply_rank(model: nn.Module, rank: int | dict[str, int], adapter_name: str) -> None:
    wanted = ranks_of_layers(model, rank, adapter_name)
    changed: list[AdapterRanks] = []
    layer: Any
    for name, layer in ranked_layers(model, adapter_name):
        if name in wanted:
            warn_if_untrained(layer.lora_views[adapter_name].schedule, wanted[name])
            set_layer_rank(layer, adapter_name, wanted[name])
            changed.append(layer.lora_views[adapter_name])
    prepare((ranks, ranks.rank) for ranks in changed)


def get_rank(model: nn.Module, adapter_name: str | None = None) -> int | dict[str, int]:
    """The rank in use outside training: an int where all modules were set alike, else a dict from module name to rank.

    Args:
        model: the model with DyLoRA or LoRA adapters.
        adapter_name: the adapter, or None for the first active one.
    """
    name = active_ranked_adapter(model, adapter_name)
    layers: list[tuple[str, Any]] = list(ranked_layers(model, name))
    if not layers:  # a stock LoRA at its full rank
        return max(layer.r[name] for _, layer in stock_layers(model, name))
    asked = {layer.lora_views[name].asked for _, layer in layers}
    # At full rank a capped module was asked for its cap or for r: both mean the same.
    if len(asked) == 1 or all(layer.lora_views[name].rank == layer.lora_views[name].max_rank for _, layer in layers):
        return max(asked)
    return {key: layer.lora_views[name].rank // layer.lora_views[name].per_rank for key, layer in layers}


def drawn_rank(model: nn.Module, adapter_name: str | None = None) -> int:
    """The rank that is drawn for this training step: forward passes in training use it until the optimizer steps.

    A module with a cap in `rank_pattern` trains at its cap where that is less.

    Args:
        model: the model with DyLoRA adapters.
        adapter_name: the adapter, or None for the first active one.
    """
    (schedule,) = schedules_of(model, adapters_with_ranks(model, adapter_name, stock=False)[:1])
    schedule.refresh()  # a checkpoint may have been loaded
    return schedule.drawn


@contextmanager
def at_rank(model: nn.Module, rank: int | dict[str, int], adapter_name: str | None = None) -> Iterator[None]:
    """`set_rank` inside a `with` block; the ranks from before come back after it, also on an error.

    Threads take turns: a second one waits until the first has left its block, so that a server can answer each request
    at a rank of its own.

        with at_rank(model, 2):
            tokens = model.generate(**inputs, max_new_tokens=20)

    Raises:
        RuntimeError: another thread computes with the model outside of `at_rank`, or another task of this thread is
            inside it. A forward pass outside while another thread is inside raises it too.
    """
    names = adapters_with_ranks(model, adapter_name)
    with held(model, names), turn(schedules_of(model, names)):
        before = _asked(model, names)
        try:
            for name in names:
                _apply_rank(model, rank, name)
            yield
        finally:
            _put_back(before)


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    loss: bool = True,
    damping: float = 0.1,
    adapter_name: str | None = None,
) -> AdapterMoments:
    """Cut every rank of a DyLoRA adapter by what it sees of some batches, instead of by its weights alone.

    With z = A x and d = dL/dz, measured at the full rank, rank b then changes the loss least, to second order: E and F
    of `functional.products` (3) with the moments of `adapter_moments`. `set_rank`, `rank_curve`, `budget_ranks` and
    `export_lora` all go by it. It is saved with the adapter, and holds until the adapter is trained further; then a
    warning says that the cut is the plain one again.

    Args:
        model: with a DyLoRA adapter of truncation="svd".
        batches: each the arguments of the model, `labels` among them with `loss`; a few are enough.
        loss: measure the gradients too; False for the cut that changes the modules' outputs least.
        damping: how much of the plain cut is in it.
        adapter_name: the adapter; None for the first active one.

    Returns:
        The moments, e.g. for `resize_adapter(..., moments=)`.

    Raises:
        ValueError: the model has no such adapter, its truncation is "prefix", or as in `adapter_moments`. Nothing is
            changed then.
    """
    name = adapters_with_ranks(model, adapter_name, stock=False)[0]
    states = {key: layer.lora_views[name] for key, layer in ranked_layers(model, name)}
    check_svd(states, name, "a calibration")
    _check_untied(model, name, "calibrate")
    (schedule,) = schedules_of(model, [name])
    with at_rank(model, schedule.ranks[-1], name):
        moments = adapter_moments(model, batches, loss, name)
        weigh(model, name, moments, damping)
    prepare((state, state.rank) for state in states.values())
    return moments


active_adapter = active_ranked_adapter  # its name of before
