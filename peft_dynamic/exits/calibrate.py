"""Thresholds for adaptive decoding, chosen on a validation set for a wanted agreement with the whole model."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peft_dynamic.exits.layers import check_exit, check_exits_work, depth_of, evenly_spaced, shown_layers
from peft_dynamic.hosts.decoder import Decoder, layer_state
from peft_dynamic.hosts.modes import evaluating

_ROWS = 512  # tokens whose logits are held at a time
_LEVELS = [step / 100 for step in range(100, 0, -1)]  # agreements at the single exits that are tried
_SUBSETS = 8  # of more exits than these not all subsets are tried


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_thresholds` found, with what it measured on the validation set.

    Attributes:
        thresholds: exit -> probability, for `generate_adaptive`; empty where no exit pays.
        agreement: share of the tokens that are the whole model's.
        mean_exit: mean layer after which a token leaves.
        cost: mean work for a token over that of the whole model; heads of exits that were tried in vain count too.
        tokens: how many tokens this rests on.
    """

    thresholds: dict[int, float]
    agreement: float
    mean_exit: float
    cost: float
    tokens: int


def calibrate_thresholds(
    model: Any,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    exits: Sequence[int] | None = None,
    agreement: float = 0.98,
    head_cost: float | None = None,
) -> Calibration:
    """The thresholds at which the tokens cost least and still agree with the whole model's as often as wanted.

    In the texts of the validation set, each token's probability at each exit is compared with whether the exit's choice
    is the whole model's. At one common level c, each exit in turn gets the lowest threshold at which at least a share c
    of those that leave there agree. For every subset of the exits c is lowered in steps of 0.01 as long as the overall
    agreement, tokens of the last layer agreeing with themselves, is at least `agreement`. The cheapest result counts.

    A token that leaves at exit e after i heads costs e + i * head_cost layers. What filling in skipped layers costs is
    left out: several tokens at once cost little more than one where reading the weights is what takes time.

    The texts are given, not generated: in generation a different token changes what comes after it.

    Args:
        model: a causal language model of transformers, or a `PeftModel` over one.
        batches: dicts with `input_ids` (B, T), `attention_mask` (B, T) where they are padded, and `labels` (B, T) if
            only the tokens whose label is not -100 shall count. A tokeniser's output and most collators' fit.
        exits: layers at which a token may leave; None for the trainer's default exits.
        agreement: the wanted share, above 0 and at most 1.
        head_cost: cost of a head in layers; None for the ratio of their numbers of weights.

    Returns:
        The thresholds and what to expect of them.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an exit or number that cannot be, or no token to count.
    """
    if isinstance(agreement, bool) or not isinstance(agreement, int | float) or not 0 < agreement <= 1:
        raise ValueError(f"agreement={agreement!r}: must be above 0 and at most 1; 0.98 is 98 %.")
    depth = depth_of(model)
    if exits is not None and (not isinstance(exits, Sequence) or isinstance(exits, str)):
        raise TypeError(f"exits={exits!r}: must be a list of layers, such as {evenly_spaced(8, depth)}.")
    wanted = sorted(set(evenly_spaced(8, depth) if exits is None else exits) - {depth})
    for exit in wanted:
        check_exit(model, exit, "exits: exit")
    if not wanted:
        raise ValueError(f"exits={exits!r}: name at least one layer below the last, {depth}.")
    if len(wanted) > _SUBSETS:
        raise ValueError(f"exits={wanted}: at most {_SUBSETS} below the last, since all their subsets are compared.")
    check_exits_work(model)
    with evaluating(model), shown_layers(model) as block:
        block.show(0, depth)
        head = _head_cost(block.decoder) if head_cost is None else head_cost
        if isinstance(head, bool) or not isinstance(head, int | float) or not 0 <= head < math.inf:
            raise ValueError(f"head_cost={head_cost!r}: must be a number of layers of at least 0.")
        found = [_measured(block.decoder, batch, [*wanted, depth]) for batch in batches]
    sure = torch.cat([each[0] for each in found], dim=1) if found else torch.empty(0, 0)
    right = torch.cat([each[1] for each in found], dim=1) if found else torch.empty(0, 0)
    if not sure.numel():
        raise ValueError("batches: there is no token to count in them.")
    return cheapest(sure, right, wanted, depth, agreement, head)


def cheapest(
    sure: torch.Tensor, right: torch.Tensor, exits: list[int], depth: int, agreement: float, head: float
) -> Calibration:
    """Try subsets and levels; `sure` and `right` are (exits, tokens)."""
    best = Calibration({}, 1.0, float(depth), 1.0, sure.shape[1])
    for size in range(1, len(exits) + 1):
        for chosen in itertools.combinations(range(len(exits)), size):
            floor = (exits[chosen[0]] + head) / (depth + head)
            if floor >= best.cost:
                continue
            for level in _LEVELS:
                trial = at_level(sure, right, chosen, exits, depth, level, head)
                if trial.agreement < agreement:
                    break
                if trial.thresholds and trial.cost < best.cost:
                    best = trial
    return best


def at_level(
    sure: torch.Tensor,
    right: torch.Tensor,
    chosen: Sequence[int],
    exits: list[int],
    depth: int,
    level: float,
    head: float,
) -> Calibration:
    """The thresholds of these exits at which a share `level` of the tokens that leave agrees with the full depth."""
    thresholds: dict[int, float] = {}
    inside = torch.ones(sure.shape[1], dtype=torch.bool)
    agreed, layers, cost = 0, 0.0, 0.0
    total = sure.shape[1]
    for number in chosen:
        p, hit = sure[number][inside], right[number][inside]
        threshold = lowest(p, hit, level)
        if threshold is None:
            continue  # no head is computed here
        thresholds[exits[number]] = threshold
        cost += head * len(p)
        leaving = p >= threshold
        agreed += int(hit[leaving].sum())
        layers += exits[number] * int(leaving.sum())
        inside[inside.clone()] = ~leaving
        if not inside.any():
            break
    rest = int(inside.sum())
    layers += depth * rest
    cost += layers + head * rest
    return Calibration(thresholds, (agreed + rest) / total, layers / total, cost / total / (depth + head), total)


def lowest(p: torch.Tensor, hit: torch.Tensor, level: float) -> float | None:
    """The lowest threshold at which a share `level` of those at or above it hit; None if there is none."""
    order = p.argsort(descending=True)
    ranked, share = p[order], hit[order].double().cumsum(0) / torch.arange(1, len(p) + 1)
    fits = share >= level - 1e-12
    fits[:-1] &= ranked[:-1] > ranked[1:]  # equals stay together
    if not fits.any():
        return None
    at = int(fits.nonzero()[-1])
    here = float(ranked[at])
    # Half way to the next, so that rounding does not decide
    return here if at + 1 == len(p) else (here + float(ranked[at + 1])) / 2


def _measured(decoder: Decoder, batch: Any, exits: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(exits - 1, tokens) probabilities, and whether the choice is that of the last exit."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise TypeError(f"batches: each must be a dict with input_ids, got {type(batch).__name__}.")
    device = decoder.model.get_input_embeddings().weight.device
    ids = batch["input_ids"].to(device)
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask.to(device)
    labels = batch.get("labels")
    counted = mask[:, 1:].bool() & mask[:, :-1].bool() if labels is None else labels[:, 1:].to(device) != -100
    states: dict[int, torch.Tensor] = {}
    layers = list(decoder.layers)
    handles = [
        layers[exit - 1].register_forward_hook(
            lambda _, args, output, exit=exit: states.__setitem__(exit, layer_state(output)[:, :-1][counted])
        )
        for exit in exits
    ]
    more = {}
    if "position_ids" in inspect.signature(type(decoder.backbone).forward).parameters:
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    try:
        decoder.backbone(input_ids=ids, attention_mask=mask, use_cache=False, **more)
    finally:
        for handle in handles:
            handle.remove()
    sure, choice = [], []
    for exit in exits:
        parts = [decoder.logits(part).float() for part in states[exit].split(_ROWS)]
        largest = [part.max(-1) for part in parts]
        sure += [torch.cat([(top.values - part.logsumexp(-1)).exp() for top, part in zip(largest, parts, strict=True)])]
        choice += [torch.cat([top.indices for top in largest])]
    p, tokens = torch.stack(sure).cpu(), torch.stack(choice).cpu()
    return p[:-1], tokens[:-1] == tokens[-1]


def _head_cost(decoder: Decoder) -> float:
    layer = sum(parameter.numel() for parameter in decoder.layers.parameters()) / decoder.depth
    return decoder.head.weight.numel() / layer
