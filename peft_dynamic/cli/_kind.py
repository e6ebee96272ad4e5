"""Whether a base model is of the kind that a training verb trains, by its configuration: before any weight is read."""

from __future__ import annotations

from typing import Any

import typer
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from peft_dynamic.cli._edge import blame
from peft_dynamic.hosts.blocks import is_encoder_type

OPTION = "--model_name_or_path"
DECODER = "Pass a decoder, such as a Llama, a Qwen or a GPT"


def check_kind(verb: str, task_type: str, name: str, settings: dict[str, Any]) -> None:
    """Stop unless the verb can train this base model.

    Args:
        verb: its name.
        task_type: what it trains: "CAUSAL_LM" or "SEQ_CLS".
        name: the base model.
        settings: what `from_pretrained` is given.

    Raises:
        UserError: the configuration cannot be had.
        typer.BadParameter: the model is of another kind.
    """
    kept = {key: settings[key] for key in ("revision", "trust_remote_code") if settings.get(key)}
    with blame(f"{OPTION} {name} has no configuration that loads", "Pass a folder or a name on the Hub that has."):
        config = AutoConfig.from_pretrained(name, **kept)
    problem = _no_classifier(config) if task_type == "SEQ_CLS" else _no_decoder(config, verb)
    if problem:
        raise typer.BadParameter(f"{name}: {problem}", param_hint=OPTION)


def _no_decoder(config: PretrainedConfig, verb: str) -> str | None:
    kind = f"a model of type {config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder, and {verb} trains decoders alone. {DECODER}."
    if is_encoder_type(config) and not getattr(config, "is_decoder", False):
        fix = f"{DECODER}, or train a classifier with peft-dynamic classify"
        return f"{kind} is an encoder, which sees what comes after a token, and {verb} trains decoders alone. {fix}."
    if verb == "ppo" and not _has(config, MODEL_FOR_CAUSAL_LM_MAPPING, "AutoModelForCausalLM"):
        return f"{kind} has no head of a causal language model, and ppo trains policies with one. {DECODER}."
    return None


def _no_classifier(config: PretrainedConfig) -> str | None:
    if _has(config, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "AutoModelForSequenceClassification"):
        return None
    return (
        f"transformers has no head for sequence classification of a model of type {config.model_type!r}, and classify "
        "trains one. Pass a model with one, such as a BERT, a ModernBERT or a Llama."
    )


def _has(config: PretrainedConfig, mapping: Any, auto_class: str) -> bool:
    """Whether transformers, or the model's own code, has a model of an auto class."""
    return type(config) in mapping or auto_class in (getattr(config, "auto_map", None) or {})
