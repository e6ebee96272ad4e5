"""What an adapter is, and the code that loads it. A stranger's configuration is foreign text too."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from keyword import iskeyword
from pathlib import Path
from typing import Any

from peft_dynamic.cards.text import code, inline, literal
from peft_dynamic.methods import Method, method_of

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
NO_BASE = "path/to/the/base/model"
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def base_repo(config: Mapping[str, Any]) -> str | None:
    """The base model's name on the Hub; None for a folder, which means nothing elsewhere."""
    base = config.get("base_model_name_or_path") or ""
    return base if isinstance(base, str) and REPO_ID.fullmatch(base) and not Path(base).exists() else None


def model_class_name(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The class of an adapter's base model, as library and name; None for the name if the adapter does not say it.

    Args:
        config: the values of an adapter_config.json. PEFT writes `auto_mapping` there if there is no `task_type`.
    """
    task = config.get("task_type")
    task = getattr(task, "value", task)
    if isinstance(task, str) and task in AUTO_CLASSES:
        return "transformers", AUTO_CLASSES[task]
    noted = config.get("auto_mapping")
    noted = noted if isinstance(noted, dict) else {}
    library, name = noted.get("parent_library"), noted.get("base_model_class")
    if isinstance(library, str) and isinstance(name, str):
        return library, name
    return "transformers", None


def about(config: Mapping[str, Any]) -> str:
    """What the adapter is, in a few sentences."""
    method = method_of(config)
    if method is None:
        kind = "LoRA" if config["peft_type"] == "LORA" else inline(config["peft_type"])
        return f"A {kind} adapter{_of_rank(config)}. It loads in PEFT as it is."
    authors, number = method.paper
    return (
        f"A {method.name} adapter{_ranks(config) if method.ranked else f': {method.summary}.'} It needs the package "
        f"`peft-dynamic`: without the line `import peft_dynamic`, PEFT stops with `KeyError: '{method.name}'`. The "
        f"method is {method.title}, of [{authors}](https://arxiv.org/abs/{number})."
    )


def _of_rank(config: Mapping[str, Any]) -> str:
    patterns = config.get("rank_pattern")
    found = {config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())}
    ranks = sorted(rank for rank in found if isinstance(rank, int))
    if not ranks:
        return ""
    return f" of rank {', '.join(map(str, ranks))}" if len(ranks) <= 8 else f" of ranks {ranks[0]} to {ranks[-1]}"


def _ranks(config: Mapping[str, Any]) -> str:
    trained = config.get("ranks") or range(1, int(config["r"]) + 1)
    listed = ", ".join(str(int(rank)) for rank in trained) if len(trained) <= 16 else f"1 to {int(config['r'])}"
    prefix = config.get("truncation") == "prefix"
    kept = "first b rows and columns of its factors" if prefix else "b leading singular components of its update"
    return f": one training run, usable at the ranks {listed}. Rank b is the {kept}."


def loading(config: Mapping[str, Any], base: str | None, source: str, subfolder: str = "", stock: bool = False) -> str:
    """The lines that load an adapter.

    Args:
        config: of the adapter.
        base: the base model's name on the Hub, where it is known.
        source: the repository, or the folder's name.
        subfolder: where in it the adapter is; "" for its top.
        stock: it is a stock LoRA there, whatever `config` is of.
    """
    method: Method | None = None if stock else method_of(config)
    place = f", subfolder={literal(subfolder)}" if subfolder else ""
    lines = [
        *([] if method is None else [f"import peft_dynamic  # registers {method.name} with PEFT"]),
        "from peft import PeftModel",
        *_base_lines(config, base or NO_BASE),
        f"model = PeftModel.from_pretrained(base, {literal(source)}{place})",
    ]
    if method is not None and method.ranked:
        rank = int(config["r"])
        lines += [
            f"model.set_rank({rank})  # the rank to run at, up to {rank}",
            f'# peft_dynamic.export_lora(model, "lora", rank={rank}) writes that rank as a stock LoRA adapter',
        ]
    return "\n".join(lines)


def _base_lines(config: Mapping[str, Any], base: str) -> list[str]:
    """The lines that load the base model."""
    library, name = model_class_name(config)
    if name is None:
        return [
            "from transformers import AutoModel",
            "",
            f"base = AutoModel.from_pretrained({literal(base)})  # or its class",
        ]
    if not _MODULE.fullmatch(library) or not _MODULE.fullmatch(name) or "." in name or iskeyword(name):
        return ["", "base = ...  # the model that it was trained on"]
    if library.partition(".")[0] == "transformers":
        return [f"from transformers import {name}", "", f"base = {name}.from_pretrained({literal(base)})"]
    return ["", f"base = ...  # the {name} that it was trained on"]


def warn_of_class(config: Mapping[str, Any]) -> None:
    """Say so where the adapter does not tell what its base model is."""
    if model_class_name(config)[1] is None:
        warnings.warn(
            "the adapter says neither its task_type nor its model's class, so the card cannot say how to load its base "
            "model. Pass task_type to the adapter's config, e.g. task_type='CAUSAL_LM'.",
            stacklevel=3,
        )


def listed(names: list[str]) -> str:
    """Names as spans of code in a sentence."""
    return ", ".join(map(code, names))
