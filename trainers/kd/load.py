"""A teacher from a folder or the Hub: a whole model or an adapter over one, as its own configuration says.

An adapter over the base model that the student has too shares that model's frozen weights: they are in memory once.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import peft
import torch
import transformers
from torch import nn

from peft_dynamic.hosts.blocks import base_model

_AUTO = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "AutoPeftModelForSequenceClassification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "AutoPeftModelForTokenClassification"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "AutoPeftModel"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "AutoPeftModelForSeq2SeqLM"),
}

_CAUSAL = ("AutoModelForCausalLM", "AutoPeftModelForCausalLM")


def load_model(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """A model of the class that its folder names, or a causal model's adapter over its base; and its tokenizer or None.

    Raises:
        ValueError: nothing can be loaded from there, or an adapter of another task, whose classes it does not say.
    """
    place = os.fspath(path)
    try:
        if transformers.utils.peft_utils.find_adapter_config_file(place) is not None:
            if peft.PeftConfig.from_pretrained(place).task_type != "CAUSAL_LM":
                raise ValueError("it is an adapter, and no causal model's. Pass the loaded model as teacher")
            model = peft.AutoPeftModelForCausalLM.from_pretrained(place)
        else:
            (kind,) = transformers.AutoConfig.from_pretrained(place).architectures or [""]
            if not hasattr(transformers, kind):
                raise ValueError(f"its architecture is {kind!r}, which transformers has not. Pass the loaded model")
            model = getattr(transformers, kind).from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"teacher={place!r}: {' '.join(str(error).split())}.") from error
    return model, _tokenizer(place)


def load_teacher(path: str | os.PathLike[str], student: nn.Module, quantization: str | None = None) -> tuple[Any, Any]:
    """The model and its tokenizer, or None where it has none.

    Args:
        path: a folder or a name of the Hub, of a model or an adapter.
        student: what the teacher is to be like: a classifier of as many classes, or a model with the same kind of head.
        quantization: "nf4" for 4 bits by bitsandbytes; None for the type that the file has.

    Raises:
        ValueError: nothing can be loaded from there.
    """
    classes = type(base_model(student)).__mro__
    name = next((kind for cls in classes for kind in _AUTO if cls.__name__.endswith(kind)), "")
    plain, adapter = _AUTO.get(name, _CAUSAL)
    options: dict[str, Any] = {}
    if quantization == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    place = os.fspath(path)
    try:
        is_adapter = transformers.utils.peft_utils.find_adapter_config_file(place) is not None
        if is_adapter:
            model = _over_the_students_base(place, student) if quantization is None else None
            if model is None:
                if "Classification" in name:
                    options["num_labels"] = base_model(student).config.num_labels
                model = getattr(peft, adapter).from_pretrained(place, **options)
        else:
            model = getattr(transformers, plain).from_pretrained(place, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"teacher={place!r}: no {plain} can be loaded from there: {' '.join(str(error).split())}"
        ) from error
    return model, _tokenizer(place)


def _tokenizer(place: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError):  # the folder has none
        return None


def _over_the_students_base(place: str, student: Any) -> Any:
    """The adapter over a copy of the student's base model without copies of its weights; None where it has another.

    PEFT has adapters of one method in a model, so a LoRA cannot stand beside a LoRETTA there.
    """
    wanted = peft.PeftConfig.from_pretrained(place).base_model_name_or_path
    own = getattr(base_model(student), "name_or_path", None)
    if not hasattr(student, "peft_config") or not wanted or wanted != own:
        return None
    shared = {id(p): p for p in student.parameters() if not p.requires_grad}
    base = copy.deepcopy(student, dict(shared)).unload()
    taken = {id(p) for p in base.parameters()}
    return peft.PeftModel.from_pretrained(base, place) if taken <= shared.keys() else None  # else it has a trained part
