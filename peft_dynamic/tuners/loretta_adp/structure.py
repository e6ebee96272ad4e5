"""Finds by structure, not by tables of names, where a model's adapters go, its layer norms and its classifier.

A block is an item of a list of repeated layers that holds an attention module and linear layers beside it. In a block,
the feed-forward output projection is the last linear layer outside of the attention modules, and its width is the
model's. The attention's output projection is the last linear layer of that width in an attention module that is not
named like a query, key or value. A block with two attention modules (a decoder's cross-attention) has two of them.
Where this cannot tell, it says why, and the user names the layers.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .layer import linear_features

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
# Names of the projections that open an attention, in any order before or after the one that closes it (Phi-3).
_OPENING = re.compile(r"^(q|k|v|qkv|kv|query|key|value)(_?(proj|lin|layer))?$|^(in_proj|c_attn|Wqkv|query_key_value)$")


class Target(NamedTuple):
    """A linear layer and whether its adapter works on its input (`before`) or its output."""

    name: str
    before: bool


def original_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` as it was before any adapter: names of the same modules, seen through PEFT's wrappers."""
    if isinstance(model, BaseTunerLayer):
        model = model.get_base_layer()
    while isinstance(model, AuxiliaryTrainingWrapper):
        model = model.original_module
    yield prefix, model
    for name, child in model.named_children():
        yield from original_modules(child, f"{prefix}.{name}" if prefix else name)


def _below(name: str, ancestors: list[str]) -> bool:
    return any(name.startswith(f"{ancestor}.") for ancestor in ancestors)


class _Block:
    """One block: names and sizes of its linear layers, parted into those of attentions and the others."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        modules = [(key, part) for key, part in original_modules(module) if key]
        self.sizes = {key: size for key, part in modules if (size := linear_features(part)) is not None}
        self.attentions: list[str] = []
        for key, part in modules:
            named = _ATTENTION.search(key.rpartition(".")[2]) or _ATTENTION.search(type(part).__name__)
            if named and key not in self.sizes and not _below(key, self.attentions) and self.inside(key):
                self.attentions.append(key)
        self.feed_forward = [key for key in self.sizes if not _below(key, self.attentions)]
        self.experts = [
            key for key, part in modules if not _below(key, self.attentions) and self._is_experts(key, part)
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
    lists = [entry for entry in lists if not any(_below(other, [entry[0]]) for other, _ in lists if other != entry[0])]
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


def is_encoder(model: nn.Module) -> bool:
    """Whether the model is of a bidirectional-encoder family (BERT and its like), by its transformers type."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return getattr(config, "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def find_norms(model: nn.Module) -> list[str]:
    """Layer norms, RMS norms among them: modules named or typed so, with parameters of one dimension and no buffers."""
    names = []
    for name, module in original_modules(model):
        called = "norm" in name.rpartition(".")[2].lower() or "norm" in type(module).__name__.lower()
        parameters = list(module.parameters())
        plain = bool(parameters) and all(parameter.dim() == 1 for parameter in parameters)
        leaf = not list(module.children()) and not list(module.buffers())
        if called and plain and leaf:
            names.append(name)
    return names


def find_heads(model: nn.Module) -> list[str]:
    """Classification heads that PEFT's own rule for SEQ_CLS ("classifier", "score") does not name."""
    return [name for name, _ in original_modules(model) if name.rpartition(".")[2] == "classification_head"]


def find_classifier_dense(model: nn.Module) -> str | None:
    """The square linear layer in front of the last layer of a classification model; None where there is none.

    In this order: `dense` inside the head (RoBERTa, ELECTRA, BART, T5), a linear layer called `pre_classifier`
    (DistilBERT), `dense` inside the pooler (BERT, DeBERTa), the pooler itself (ALBERT).
    """
    sizes = {name: linear_features(module) for name, module in original_modules(model)}
    square = [name for name, size in sizes.items() if size is not None and size[0] == size[1]]
    patterns = (r"(.*\.)?(classifier|classification_head|score|head)\.dense", r"(.*\.)?pre_classifier")
    for pattern in (*patterns, r"(.*\.)?pooler\.dense", r"(.*\.)?pooler"):
        found = [name for name in square if re.fullmatch(pattern, name)]
        if found:
            return found[0]
    return None
