"""A base model without its weights: what an adapter's files do not tell, from the base model's configuration alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from peft_dynamic.cli._edge import blame
from peft_dynamic.cli._load import hush_transformers, model_class
from peft_dynamic.cli._written import shapes_in
from peft_dynamic.export import PEFT_PREFIX, export_lora
from peft_dynamic.tuners.dylora.layer import ranked_layers
from peft_dynamic.tuners.dylora.ranks import layers_of

HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
WRONG_BASE = "Pass --model with the one that was trained on."


def outputs_of(shapes: dict[str, list[int]]) -> dict[str, int]:
    """`num_labels` of a classifier, by the head that the adapter brings along; empty without one."""
    heads = [shape for name, shape in shapes.items() if name.endswith(HEADS)]
    return {"num_labels": heads[-1][0]} if heads else {}


def class_of(config: Any, base: str) -> Any:
    """The transformers class of a base model; of a model without an adapter a causal language model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM if config is None else model_class(config, base)


def shell(config: Any, base: str, **changes: Any) -> Any:
    """The base model of an adapter, on the meta device.

    Args:
        config: the adapter's; None for none.
        base: the base model, of which the configuration is read.
        changes: of that configuration.
    """
    from transformers import AutoConfig

    hush_transformers()
    kind = class_of(config, base)
    with blame(f"the base model {base!r} could not be loaded", WRONG_BASE):
        settings = AutoConfig.from_pretrained(base, **changes)
        with torch.device("meta"):
            return kind.from_config(settings) if hasattr(kind, "from_config") else kind(settings)


def on_shell(folder: Path, config: Any, base: str) -> Any:
    """The adapter, whole, on a base model whose weights take no memory.

    Args:
        folder: the adapter's.
        config: its configuration.
        base: the base model.

    Raises:
        UserError: the base model cannot be made, or the adapter is of another one.
    """
    path = folder / "adapter_model.safetensors"
    shapes = shapes_in(path) if path.is_file() else {}
    model = shell(config, base, **outputs_of(shapes))
    own = {name.removeprefix(PEFT_PREFIX) for name in shapes}
    for name, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None:
                one = torch.zeros((), dtype=value.dtype).expand(value.shape)  # all of it is this one number
                held = one.clone() if not shapes or f"{name}.{key}" in own else one  # what the adapter brings itself
                module._parameters[key] = nn.Parameter(held.contiguous() if held is not one else one, False)
    fix = "Its files are damaged, or it is of another base model. Save the adapter again, or take another copy."
    with _unquantised(folder) as adapter, blame(f"{folder} does not load on {base}", fix):
        return PeftModel.from_pretrained(model, str(adapter))


@contextmanager
def _unquantised(folder: Path) -> Iterator[Path]:
    """The adapter, of QDyLoRA as a DyLoRA one, which has the same files and asks for no quantised layers."""
    text = (folder / "adapter_config.json").read_text(encoding="utf-8")
    if json.loads(text)["peft_type"] != "QDYLORA":
        yield folder
        return
    with tempfile.TemporaryDirectory() as work:
        for path in folder.glob("adapter_model.*"):
            Path(work, path.name).symlink_to(path.resolve())
        Path(work, "adapter_config.json").write_text(json.dumps(json.loads(text) | {"peft_type": "DYLORA"}))
        yield Path(work)


def order_of(folder: Path, config: Any, base: str) -> list[str]:
    """The modules of a DyLoRA adapter in the order of the base model, as its file names them."""
    model = on_shell(folder, config, base)
    layers = dict(ranked_layers(model))
    states = {layer.lora_views["default"].order: name for name, layer in layers.items()}
    schedule = next(iter(layers.values())).lora_views["default"].schedule
    return [states[state.order] for state in layers_of(schedule)]


def exported(folder: Path, config: Any, base: str, rank: int | None, out: Path) -> None:
    """`export_lora` of the adapter, for what its files alone do not tell."""
    export_lora(on_shell(folder, config, base), out, rank=rank)
