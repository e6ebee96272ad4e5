"""What a model's logits and labels mean, told by its class."""

from __future__ import annotations

from typing import Any

from transformers.models.auto import modeling_auto as auto

from peft_dynamic.hosts.blocks import base_model

# The order counts: an encoder-decoder is in several of them
_TASKS = (
    ("sequence", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ("tokens", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ("masked", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ("seq2seq", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ("causal", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
)


def task_of(model: Any) -> str:
    """What the model's logits and labels mean: "sequence", "tokens", "masked", "seq2seq" or "causal".

    Raises:
        ValueError: a model of another kind.
    """
    classes = [cls.__name__ for cls in type(base_model(model)).__mro__]
    for task, names in _TASKS:
        if set(classes) & {name for each in names.values() for name in ([each] if isinstance(each, str) else each)}:
            return task
    raise ValueError(
        f"{classes[0]}: what its labels mean is not known here. Distillation is for transformers' classifiers of "
        "sequences and tokens, and its masked, causal and encoder-decoder language models."
    )
