"""Finds by structure, not by tables of names, where a model's adapters go.

A block is an item of a list of repeated layers that holds an attention module and linear layers beside it. In a block,
the feed-forward output projection is the last linear layer outside of the attention modules, and its width is the
model's. The attention's output projection is the last linear layer of that width in an attention module that is not
named like a query, key or value. A block with two attention modules (a decoder's cross-attention) has two of them.
Where this cannot tell, it says why, and the user names the layers.
"""

import re
from typing import NamedTuple

from torch import nn

from peft_dynamic.hosts.blocks import (
    find_classifier_dense as find_classifier_dense,  # were here before
)
from peft_dynamic.hosts.blocks import find_heads as find_heads
from peft_dynamic.hosts.blocks import find_norms as find_norms
from peft_dynamic.hosts.blocks import is_below, is_encoder, linear_features, named_attention, original_modules

# Names of the projections that open an attention, in any order before or after the one that closes it (Phi-3).
_OPENING = re.compile(r"^(q|k|v|qkv|kv|query|key|value)(_?(proj|lin|layer))?$|^(in_proj|c_attn|Wqkv|query_key_value)$")


class Target(NamedTuple):
    """A linear layer and whether its adapter works on its input (`before`) or its output."""

    name: str
    before: bool


class _Block:
    """One block: names and sizes of its linear layers, parted into those of attentions and the others."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        modules = [(key, part) for key, part in original_modules(module) if key]
        self.sizes = {key: size for key, part in modules if (size := linear_features(part)) is not None}
        self.attentions: list[str] = []
        for key, part in modules:
            if (
                named_attention(key, part)
                and key not in self.sizes
                and not is_below(key, *self.attentions)
                and self.inside(key)
            ):
                self.attentions.append(key)
        self.feed_forward = [key for key in self.sizes if not is_below(key, *self.attentions)]
        self.experts = [
            key for key, part in modules if not is_below(key, *self.attentions) and self._is_experts(key, part)
        ]

    def inside(self, key: str) -> list[str]:
        return [linear for linear in self.sizes if linear.startswith(f"{key}.")]

    def _is_experts(self, key: str, part: nn.Module) -> bool:
        alike = isinstance(part, nn.ModuleList) and len(part) > 1 and len({type(item) for item in part}) == 1
        return (alike and bool(self.inside(key))) or any(
            parameter.dim() == 3 for parameter in part.parameters(recurse=False)
        )

    def problem(self) -> str | None:
        """Why the outputs cannot be told; None if they can."""
        if self.experts:
            return f"{self.name}.{self.experts[0]} is a mixture of experts, which has no single output projection"
        for key in self.attentions:
            if self.attention_output(key) is None:
                return (
                    f"{self.name}.{key} has no output projection, a linear layer as wide as "
                    f"{self.name}.{self.feed_forward[-1]} ({self.hidden}) that is not a query, key or value"
                )
        return None

    @property
    def hidden(self) -> int:
        """The model's width."""
        return self.sizes[self.feed_forward[-1]][1]

    def attention_output(self, key: str) -> str | None:
        outputs = [
            name
            for name in self.inside(key)
            if self.sizes[name][1] == self.hidden and not _OPENING.match(name.rpartition(".")[2])
        ]
        return outputs[-1] if outputs else None

    def targets(self, reference: bool) -> list[Target]:
        output = self.feed_forward[-1]
        if reference:
            opening = [key for key in self.feed_forward[:-1] if self.sizes[key][0] == self.hidden]
            found = [Target(key, True) for key in opening] + [Target(output, False)]
        else:
            attention = [name for key in self.attentions if (name := self.attention_output(key)) is not None]
            found = [Target(name, False) for name in [*attention, output]]
        return [Target(f"{self.name}.{key}", before) for key, before in found]


def find_targets(model: nn.Module, placement: str) -> list[Target]:
    """The layers that get adapters, in the order of the model.

    Args:
        model: any model; adapters that it already has make no difference.
        placement: "paper" or "reference", see `LorettaAdpConfig`.

    Raises:
        ValueError: the structure does not tell; the message says where and why, and what to pass instead.
    """
    advice = "Name the layers that get an adapter: target_modules=[...]."
    lists: list[tuple[str, list[_Block]]] = []
    for name, module in original_modules(model):
        if isinstance(module, nn.ModuleList) and len(module):
            blocks = [_Block(f"{name}.{key}" if name else key, item) for key, item in module.named_children()]
            if all(block.attentions and (block.feed_forward or block.experts) for block in blocks):
                lists.append((name, blocks))
    # A list of lists (ALBERT's groups): the innermost ones are the blocks.
    lists = [entry for entry in lists if not any(is_below(other, entry[0]) for other, _ in lists if other != entry[0])]
    if not lists:
        raise ValueError(
            f"target_modules=None needs a model with a list of blocks, each with an attention module and linear layers "
            f"beside it; {type(model).__name__} has none. {advice}"
        )
    for _, blocks in lists:
        for block in blocks:
            problem = block.problem()
            if problem is not None:
                raise ValueError(f"target_modules=None cannot tell where adapters go: {problem}. {advice}")
    reference = placement == "reference" and not is_encoder(model)
    return [target for _, blocks in lists for block in blocks for target in block.targets(reference)]
