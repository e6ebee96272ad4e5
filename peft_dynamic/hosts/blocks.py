"""What the modules of a transformer are: those below the adapters, linear layers, attentions, norms and heads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from peft_dynamic.hosts.quantization import is_quantized

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)


def base_model(model: Any) -> Any:
    """The model below PEFT's wrappers, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def original_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` as it was before any adapter: names of the same modules, seen through PEFT's wrappers."""
    if isinstance(model, BaseTunerLayer):
        model = model.get_base_layer()
    while isinstance(model, AuxiliaryTrainingWrapper):
        model = model.original_module
    yield prefix, model
    for name, child in model.named_children():
        yield from original_modules(child, f"{prefix}.{name}" if prefix else name)


def named_attention(name: str, module: nn.Module) -> bool:
    """Whether a module's name, or its class's, is that of an attention."""
    return bool(_ATTENTION.search(name.rpartition(".")[2]) or _ATTENTION.search(type(module).__name__))


def is_below(name: str, *ancestors: str) -> bool:
    """Whether the module of this name lies in one of these modules."""
    return any(name.startswith(f"{ancestor}.") for ancestor in ancestors)


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer that takes a tensor, plain or quantised; None for any other module."""
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return int(rows), int(columns)
    if isinstance(module, nn.Linear):
        # torch's attention reads the weight of its out_proj and never calls it, so an adapter there would do nothing
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return None
        return module.in_features, module.out_features
    if is_quantized(module):
        for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
            if all(isinstance(getattr(module, name, None), int) for name in names):
                return getattr(module, names[0]), getattr(module, names[1])
    return None


def is_encoder(model: nn.Module) -> bool:
    """Whether the model is of a bidirectional-encoder family (BERT and its like), by its transformers type."""
    return is_encoder_type(getattr(model, "config", None))


def is_encoder_type(config: Any) -> bool:
    """As `is_encoder`, of a configuration; a BERT that was made a decoder by `is_decoder` counts as an encoder too."""
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
