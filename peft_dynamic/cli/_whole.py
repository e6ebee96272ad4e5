"""What `peft-dynamic export` does for a whole model: base and update merged, or the first layers alone."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import typer

import peft_dynamic.tuners  # noqa: F401  # registers the adapter types
from peft_dynamic.cli._edge import UserError, blame
from peft_dynamic.cli._gguf import MODEL, convert, converter
from peft_dynamic.cli._given import bad_input
from peft_dynamic.cli._hollow import WRONG_BASE, class_of, outputs_of, shell
from peft_dynamic.cli._load import hush_transformers
from peft_dynamic.cli._lora import configuration
from peft_dynamic.cli._tokenizer import tokenizer_files
from peft_dynamic.cli._wanted import Wanted
from peft_dynamic.cli._written import described, shapes_in
from peft_dynamic.hosts.decoder import find_decoder
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.hosts.probe import alike, trial_logits


def write_model(wanted: Wanted) -> dict[str, Any]:
    """Write it, and say what it is. It is made beside its place, and moved there once it is whole."""
    config = configuration(wanted) if wanted.written else None
    base = str(wanted.folder) if config is None else wanted.model or config.base_model_name_or_path
    if not base:
        raise typer.BadParameter(f"missing. {wanted.adapter} does not say its base model.", param_hint="--model")
    script = converter(MODEL, wanted.llama_cpp) if wanted.gguf else None
    hollow = shell(config, base, **_outputs(wanted))
    _check_base(wanted, hollow, base)
    if wanted.dry_run:
        return _expected(hollow, wanted.depth)
    model = _merged(wanted, config, base)
    place = (wanted.out or wanted.gguf or Path()).absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".export-") as work:
        made = Path(work, "model")
        with blame(f"the model of {wanted.adapter} could not be written", "Its files are as they were."):
            model.save_pretrained(made)
        for path in tokenizer_files(wanted.folder, base):
            shutil.copyfile(path, made / path.name)
        about = described(made)
        if script is not None and wanted.gguf is not None:
            convert(script, made, wanted.gguf, "--outtype", "auto")
        if wanted.out is not None:
            with bad_input("OUT"):
                os.replace(made, wanted.out)  # the place is free, or an empty folder
    return about


def _outputs(wanted: Wanted) -> dict[str, int]:
    path = wanted.folder / "adapter_model.safetensors"
    return outputs_of(shapes_in(path)) if wanted.written and path.is_file() else {}


def _check_base(wanted: Wanted, hollow: Any, base: str) -> None:
    """Stop before anything is loaded where no ordinary model would come of it."""
    if getattr(hollow.config, "quantization_config", None) is not None:
        raise UserError(
            f"{base} is quantised: rounded to so few bits again, the sum would lose most of the update. Pass --model "
            "with the unquantised model that it was made of, or export the LoRA without --merge and load it on this."
        )
    if wanted.depth is not None:
        with bad_input("--depth"):
            layers = len(find_decoder(hollow).layers)
            if wanted.depth > layers:
                raise ValueError(f"{wanted.depth}: must be at most {layers}, the layers of {base}.")


def _expected(hollow: Any, depth: int | None) -> dict[str, Any]:
    """The size of the result, by the configuration alone."""
    sizes = {id(p): (p.numel(), p.numel() * p.element_size()) for p in hollow.parameters()}
    if depth is not None:
        for layer in list(find_decoder(hollow).layers)[depth:]:
            for parameter in layer.parameters():
                sizes.pop(id(parameter), None)
    numbers, size = (sum(column) for column in zip(*sizes.values(), strict=True))
    return {"files": {"model.safetensors": size}, "bytes": size, "parameters": numbers}


def _merged(wanted: Wanted, config: Any, base: str) -> Any:
    """The model with the update in its weights, tried with three tokens before and after."""
    from peft import PeftModel

    from peft_dynamic.exits import exit_at, truncate_to_exit

    hush_transformers()
    kind = class_of(config, base)
    with blame(f"the base model {base!r} could not be loaded", WRONG_BASE):
        model = kind.from_pretrained(base, dtype="auto", **_outputs(wanted))
    if config is not None:
        fix = "Its files are damaged, or it is of another base model. Save it again, or take another copy."
        with blame(f"{wanted.adapter} does not load on {base}", fix):
            model = PeftModel.from_pretrained(model, str(wanted.folder))
        if wanted.rank is not None:
            model.set_rank(wanted.rank)
    try:
        with nullcontext() if wanted.depth is None else exit_at(model, wanted.depth):
            expected = _trial(model)
        made = (
            model.merge_and_unload(safe_merge=True) if wanted.depth is None else truncate_to_exit(model, wanted.depth)
        )
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise UserError(f"{wanted.adapter} cannot become a model of its own: {error}") from error
    _untie(made)
    after = _trial(made)
    if expected is not None and after is not None and not alike(expected, after):
        raise UserError(
            f"{wanted.adapter}: the merged model computes other logits than the adapter on {base}, as where it adapts "
            "a matrix that the model uses twice. Export the LoRA without --merge."
        )
    return made


def _trial(model: Any) -> torch.Tensor | None:
    """Logits of three tokens; None for a model with an encoder beside its decoder, which needs more than tokens."""
    if model.config.is_encoder_decoder:
        return None
    with evaluating(model):
        return trial_logits(model)


def _untie(model: Any) -> None:
    """A head of its own, which an adapter brought along, is not tied to the embeddings: other programs go by that."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and model.config.tie_word_embeddings and head.weight.data_ptr() != table.weight.data_ptr():
        model.config.tie_word_embeddings = False
