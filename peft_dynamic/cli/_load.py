"""Loading a model for a task, and where and how it computes."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

from peft_dynamic.cli._edge import UserError, blame, debugging


def model_class(config: Any, base: str) -> Any:
    """The transformers class of an adapter's base model: by its task, by PEFT's note of it, or by the base's config.

    Args:
        config: the adapter's configuration.
        base: the base model.

    Raises:
        UserError: nothing says which, or it is none of transformers'.
    """
    import transformers

    from peft_dynamic.cards import model_class_name

    library, name = model_class_name(vars(config))
    if name is None:
        with blame(f"--model: {base!r}", "Pass a model that transformers loads."):
            name = (transformers.AutoConfig.from_pretrained(base).architectures or [None])[0]
        library = "transformers"
        if name is None:
            raise UserError(f"neither the adapter nor {base!r} says its model's class. Save it with a task_type.")
        warnings.warn(
            f"the adapter says neither its task_type nor its model's class; it is taken for {name}, as {base} says. "
            "Pass task_type to the adapter's config where it is trained.",
            stacklevel=2,
        )
    if library.partition(".")[0] != "transformers":
        raise UserError(
            f"the adapter is of a {name} of {library}, and the command loads models of transformers alone. Load it in "
            "Python and use peft_dynamic.export_lora."
        )
    try:
        return getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"transformers has no {library}.{name}, the class of the adapter's base model.") from error


def load_decoder(name: str, dtype: Any, settings: dict[str, Any]) -> Any:
    """A causal language model, all of whose weights are in its checkpoint.

    Raises:
        UserError: it could not be loaded, has weights missing, or is no decoder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with blame(f"--model: {name!r} could not be loaded as a causal language model", "Pass one that is."):
        model, found = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **settings)
    for what in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, found.get(what) or ())):
            raise UserError(
                f"--model: {name!r} has no weights for {len(keys)} tensors of {type(model).__name__}, such as "
                f"{keys[0]} ({what.replace('_', ' ')}): they would be random. Pass a causal language model whole."
            )
    if not settings:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    if not is_causal(model):
        raise UserError(
            f"--model: {name!r}, a {type(model).__name__}, sees what comes after a token: it is an encoder, and cannot "
            "be trained to go on with a text. Pass a decoder, such as a Llama or a GPT."
        )
    return model


def hush_transformers() -> None:
    """Its bars and its log, which are switched in the process; a variable that says so is read when it is imported."""
    from transformers.utils import logging

    if not debugging():
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer, which pads on the right.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    with blame(f"--model: {name!r} has no tokenizer that loads", "Pass a model with one."):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_classifier(name: str, dtype: Any, settings: dict[str, Any], others: dict[str, Any]) -> Any:
    """A base model under a classifier's head, of which the adapter brings all that the checkpoint lacks.

    Args:
        name: the base model.
        dtype: its dtype.
        settings: further arguments of `from_pretrained`.
        others: the adapter's tensors beside its factors, by their names in its file; the head is among them.

    Raises:
        UserError: it could not be loaded, or weights would be random.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    heads = [key for key in others if key.endswith(("classifier.weight", "score.weight", "classifier.out_proj.weight"))]
    outputs = {"num_labels": len(others[heads[-1]])} if heads else {}
    torch.manual_seed(0)  # the base model's own head is random, and the same at each call
    with blame(f"--model: {name!r} could not be loaded as a classifier", "Pass the one that was trained on."):
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **outputs, **settings
        )
    brought = {key.removeprefix("base_model.model.") for key in others}
    random = sorted(map(str, {*found["missing_keys"]} - brought))
    if random:
        raise UserError(
            f"--model: neither {name!r} nor the adapter has weights for {len(random)} tensors of "
            f"{type(model).__name__}, such as {random[0]}: they would be random. Save the adapter with its head in "
            "modules_to_save, or pass the classifier that was trained on."
        )
    if not settings:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model


def is_causal(model: Any) -> bool:
    """Whether a token's output stays as it is under another token after it.

    What another token before it changes is the measure: rounding may differ by a little between two inputs.
    """
    import torch

    from peft_dynamic.hosts.modes import eval_mode

    vocabulary = model.get_input_embeddings().weight.shape[0]

    def outputs(*tokens: int) -> torch.Tensor:
        ids = torch.tensor([tokens], device=device(model)) % vocabulary
        # with gradients: bitsandbytes' 4-bit layers take a forward without them for the start of inference
        logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits.detach().float()[0]

    with eval_mode(model):
        plain = outputs(5, 6)
        by_the_next = (plain - outputs(5, 7))[0].abs().max()
        by_the_last = (plain - outputs(8, 6))[1].abs().max()
    return bool(by_the_next <= 0.1 * by_the_last)


def device(model: Any) -> Any:
    """Where the model is."""
    return next(model.parameters()).device


def autocast(model: Any, dtype: Any) -> Any:
    """Mixed precision where the dtype is bfloat16."""
    import torch

    return torch.autocast(device(model).type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def fast_dtype() -> Any:
    """The dtype for training the adapter: bfloat16 where the machine computes it faster than float32.

    On a CPU that is measured, since it varies a lot: some processors have matrix units for bfloat16, others emulate it.
    And tried: torch 2.13's attention in it raises where ATEN_CPU_CAPABILITY hides AVX-512 and matrix units are in use.
    """
    import time

    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    tokens = torch.ones(1, 4, 512, 64, dtype=torch.bfloat16)  # fewer take another kernel
    try:
        torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True)
    except RuntimeError:
        return torch.float32
    seconds: dict[Any, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        start = time.perf_counter()
        a @ b  # the first call sets things up
        if dtype == torch.bfloat16 and time.perf_counter() - start > 20 * seconds[torch.float32]:
            return torch.float32  # emulated: three more would take seconds
        times = []
        for _ in range(3):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return min(seconds, key=lambda dtype: seconds[dtype])


def read_json(path: Path) -> Any:
    """A JSON file that has to hold an object.

    Raises:
        UserError: it is damaged.
    """
    with blame(str(path), "The file is damaged: save the adapter again, or take another copy."):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return content
