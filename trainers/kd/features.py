"""Inner states as a further term of the loss: which layers, how they are seen, and how widths are matched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from peft_dynamic.functional import features
from peft_dynamic.hosts.blocks import base_model

KINDS = ("relations", "hidden", "cosine")
MAPS = ("last", "uniform", "skip")
_APART = (  # the names of queries, keys and values in transformers' attentions
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
)
_FUSED = ("c_attn", "qkv_proj", "Wqkv")  # all three, one after the other


class Features:
    """The further terms of a loss, for one student and one teacher.

    Args:
        student: the student.
        teacher: the teacher's model, which is the student itself where it teaches itself.
        weights: name -> weight.
        layer_map: which layers are compared.
        heads: A of the relations; None for the student's heads.
        causal: whether tokens see those before them alone.

    Raises:
        ValueError: a layer that is not there, heads that do not divide the widths, attentions of an unknown form.
    """

    def __init__(
        self, student: Any, teacher: Any, weights: dict[str, float], layer_map: str, heads: int | None, causal: bool
    ) -> None:
        self.weights, self.causal = weights, causal
        own, theirs = (base_model(model).config.get_text_config() for model in (student, teacher))
        self.pairs = pairs_of(layer_map, own.num_hidden_layers, theirs.num_hidden_layers)
        self.states = bool(weights.keys() & {"hidden", "cosine"})
        self.projections = nn.ModuleList()
        if "relations" in weights:
            self.heads = _heads(heads, own, theirs)
            for model in (student, teacher):
                attentions(model)
        elif heads is not None:
            raise ValueError(f"relation_heads={heads} is of features='relations:1', which are not asked for.")
        if self.states and own.hidden_size != theirs.hidden_size:
            draw = torch.Generator().manual_seed(0)
            for _ in self.pairs:
                made = nn.Linear(own.hidden_size, theirs.hidden_size, bias=False)
                with torch.no_grad():
                    made.weight.normal_(std=own.hidden_size**-0.5, generator=draw)
                made.weight.register_post_accumulate_grad_hook(_averaged)
                self.projections.append(made.to(next(student.parameters()).device))

    @contextmanager
    def watching(self, model: Any, side: int) -> Iterator[dict[int, list[torch.Tensor]]]:
        """Inside the block the model's queries, keys and values are noted.

        Args:
            model: the student or the teacher.
            side: 0 for the student, 1 for the teacher.

        Yields:
            layer -> the three, (B, T, D) each, once the model has run.
        """
        seen: dict[int, list[torch.Tensor]] = {}
        handles = []
        if "relations" in self.weights:
            layers = attentions(model)
            for layer in {pair[side] for pair in self.pairs}:
                width = _widths(base_model(model).config.get_text_config())[0]
                for module in layers[layer - 1]:
                    handles.append(module.register_forward_hook(_note(seen, layer, width, len(layers[layer - 1]))))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def losses(
        self,
        student: tuple[Any, dict[int, list[torch.Tensor]]],
        teacher: tuple[Any, dict[int, list[torch.Tensor]]],
        mask: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """(B,) of each term, without its weight: the mean over the pairs of layers, the sum over the relations.

        Args:
            student: its states by layer, the embeddings first, and what `watching` gave.
            teacher: the same of the teacher.
            mask: (B, T) bool, the tokens that are there.
        """
        found: dict[str, torch.Tensor] = {}
        for name in self.weights:
            each = []
            for place, (one, other) in enumerate(self.pairs):
                if name == "relations":
                    both = zip(student[1][one], teacher[1][other], strict=True)
                    parts = [features.relations(s, t.to(s.device), self.heads, mask, self.causal) for s, t in both]
                    each.append(torch.stack(parts).sum(0))
                    continue
                state = student[0][one]
                state = state.to(torch.promote_types(state.dtype, torch.float32))
                if self.projections:
                    projection = self.projections[place]
                    state = projection(state.to(projection.weight))
                each.append(getattr(features, name)(state, teacher[0][other].to(state), mask))
            found[name] = torch.stack(each).mean(0)
        return found


def pairs_of(layer_map: str, student: int, teacher: int) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer), both from 1: "last", "uniform", "skip", or such as "1:2 2:4".

    Args:
        layer_map: as the field.
        student: how many layers it has.
        teacher: how many layers it has.

    Raises:
        ValueError: a layer that is not there, or no layer.
    """
    spread = [(k, math.ceil(k * teacher / student)) for k in range(1, student + 1)]
    if layer_map in MAPS:
        found = {"last": spread[-1:], "uniform": spread, "skip": spread[:-1]}[layer_map]
        if not found:
            raise ValueError(f"layer_map={layer_map!r}: leaves the last layer out, the student's one. Use 'last'.")
        return found
    found = parse_pairs(layer_map)
    if any(not (1 <= one <= student and 1 <= other <= teacher) for one, other in found):
        raise ValueError(
            f"layer_map={layer_map!r}: the student has the layers 1 to {student} and the teacher 1 to {teacher}."
        )
    return found


def parse_pairs(layer_map: Any) -> list[tuple[int, int]]:
    """The pairs of a text such as "1:2 2:4"; none of a name.

    Raises:
        ValueError: it is neither.
    """
    if layer_map in MAPS:
        return []
    try:
        pairs = [(int(one), int(other)) for one, other in (word.split(":") for word in layer_map.split())]
    except (ValueError, AttributeError):
        pairs = []
    if not pairs:
        raise ValueError(
            f"layer_map={layer_map!r}: must be {', '.join(map(repr, MAPS))}, or pairs of the student's and the "
            "teacher's layers, from 1, such as '1:2 2:4'."
        )
    return pairs


def parse_weights(value: Any) -> dict[str, float] | None:
    """`features` as a dict; of a text such as "relations:1 hidden:0.5" too.

    Raises:
        ValueError: a name or a weight without meaning.
    """
    if value is None:
        return None
    try:
        pairs = value.items() if isinstance(value, dict) else [word.split(":") for word in value.split()]
        found = {name: float(weight) for name, weight in pairs}
    except (ValueError, AttributeError, TypeError):
        found = {}
    if not found or any(name not in KINDS or not 0 < weight < math.inf for name, weight in found.items()):
        raise ValueError(
            f"features={value!r}: must have {', '.join(KINDS)} with weights greater than 0, such as "
            "{'relations': 1.0} or 'relations:1 hidden:0.5'."
        )
    return found


def attentions(model: Any) -> list[list[nn.Module]]:
    """By layer, the modules that make queries, keys and values: three, or one that makes all.

    Raises:
        ValueError: there are not as many as there are layers.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        names = next((triple for triple in _APART if triple[0] == last), None)
        if last in _FUSED:
            found.append([module])
        elif names is not None and all(f"{parent}.{each}" in modules for each in names):
            found.append([modules[f"{parent}.{each}"] for each in names])
    layers = base_model(model).config.get_text_config().num_hidden_layers
    if len(found) != layers:
        raise ValueError(
            f"features='relations': {type(base_model(model)).__name__} has {layers} layers, and queries, keys and "
            f"values were found in {len(found)}. Use features='hidden' or 'cosine', which need the states alone."
        )
    return found


def _note(seen: dict[int, list[torch.Tensor]], layer: int, width: int, modules: int) -> Any:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if modules == 1:  # a key's width is half of what the queries leave
            seen[layer] = list(output.split([width, *[(output.shape[-1] - width) // 2] * 2], -1))
        else:
            seen.setdefault(layer, []).append(output)

    return hook


def _widths(config: Any) -> tuple[int, int]:
    """Of the queries, and of the keys and values."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size


def _heads(asked: int | None, own: Any, theirs: Any) -> int:
    widths = [*_widths(own), *_widths(theirs)]
    most = math.gcd(*widths)
    heads = own.num_attention_heads if asked is None else asked
    if most % heads:
        fit = [each for each in range(1, most + 1) if most % each == 0]
        given = f"relation_heads={asked}" if asked is not None else f"relation_heads, {heads} as in the student,"
        raise ValueError(
            f"{given} must divide the widths of all queries, keys and values, {sorted(set(widths))}. Set one of {fit}."
        )
    return int(heads)


def _averaged(parameter: torch.Tensor) -> None:
    """The mean of the gradients of all processes, as DDP takes of the student's, which has no projections."""
    if dist.is_available() and dist.is_initialized():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
