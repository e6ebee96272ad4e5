"""Tiny models of each family, and the loss with its density term written out by hand."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import set_seed

from peft_dynamic.density import ActivationDensityLoss

VOCABULARY = 64
EPS, WEIGHT = 1e-2, 3.0

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_DECODER = _COMMON | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
_BART = {"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 64} | {
    f"{stack}_{name}": value
    for stack in ("encoder", "decoder")
    for name, value in (("layers", 2), ("ffn_dim", 48), ("attention_heads", 4))
}
# name -> head class, settings, the end of the activations' names, and how many there are
FAMILIES: dict[str, tuple[str, dict, str, int]] = {
    "Bert": ("ForSequenceClassification", _COMMON, "intermediate_act_fn", 2),
    "Roberta": ("ForSequenceClassification", _COMMON, "intermediate_act_fn", 2),
    "Electra": ("ForSequenceClassification", _COMMON | {"embedding_size": 32}, "intermediate_act_fn", 2),
    "Deberta": ("ForSequenceClassification", _COMMON, "intermediate_act_fn", 2),
    "DebertaV2": ("ForSequenceClassification", _COMMON, "intermediate_act_fn", 2),
    "Albert": ("ForSequenceClassification", _COMMON | {"embedding_size": 32}, "activation", 1),
    "DistilBert": (
        "ForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        "activation",
        2,
    ),
    "T5": ("ForConditionalGeneration", _T5, "DenseReluDense.act", 4),
    "T5 gated": ("ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"}, "DenseReluDense.act", 4),
    "Bart": ("ForConditionalGeneration", _BART, "activation_fn", 4),
    "Llama": ("ForCausalLM", _DECODER | {"num_key_value_heads": 2}, "act_fn", 2),
    "Qwen2": ("ForCausalLM", _DECODER | {"num_key_value_heads": 2}, "act_fn", 2),
    "Mistral": ("ForCausalLM", _DECODER | {"num_key_value_heads": 2}, "act_fn", 2),
    "Gemma": ("ForCausalLM", _DECODER | {"num_key_value_heads": 2, "head_dim": 8}, "act_fn", 2),
    "Phi": ("ForCausalLM", _DECODER, "activation_fn", 2),
    "Phi3": ("ForCausalLM", _DECODER | {"num_key_value_heads": 2}, "activation_fn", 2),
    "Olmo": ("ForCausalLM", _DECODER, "act_fn", 2),
    "GPT2": ("LMHeadModel", _OLD | {"n_positions": 64}, "act", 2),
    "OPT": (
        "ForCausalLM",
        {key: value for key, value in _DECODER.items() if key != "intermediate_size"}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "activation_fn",
        2,
    ),
    "GPTNeoX": ("ForCausalLM", _DECODER, "act", 2),
    "Falcon": (
        "ForCausalLM",
        {key: value for key, value in _DECODER.items() if key != "intermediate_size"},
        "act",
        2,
    ),
    "Bloom": (
        "ForCausalLM",
        {key: v for key, v in _OLD.items() if key != "n_embd"} | {"hidden_size": 32},
        "gelu_impl",
        2,
    ),
    "ViT": (
        "ForImageClassification",
        {key: v for key, v in _COMMON.items() if "vocab" not in key and "max" not in key}
        | {"image_size": 16, "patch_size": 8},
        "activation_fn",
        2,
    ),
}


def build(family: str) -> Any:
    """A model with random weights and no dropout, in training mode."""
    head, settings, _, _ = FAMILIES[family]
    name = family.partition(" ")[0]
    set_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    if name == "T5":
        config.decoder_start_token_id = 0
    model = getattr(transformers, f"{name}{head}")(config)
    return without_dropout(model).train()


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StableDropout":
            module.p = 0.0
        for name in (
            "dropout",
            "attention_dropout",
            "activation_dropout",
            "hidden_dropout",
            "attention_probs_dropout_prob",
        ):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def with_lora(family: str, **settings: Any) -> Any:
    """The model with a LoRA on every linear layer whose B is not 0."""
    if family == "DistilBert":  # PEFT would adapt its pre_classifier and train it whole, which it then refuses
        settings["exclude_modules"] = ["pre_classifier", "classifier"]
    settings |= {"task_type": task(family), "fan_in_fan_out": family == "GPT2"}
    return perturbed(get_peft_model(build(family), LoraConfig(r=4, target_modules="all-linear", **settings)))


def perturbed(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def task(family: str) -> str | None:
    head = FAMILIES[family][0]
    kinds = {"ForSequenceClassification": "SEQ_CLS", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    if family == "DistilBert":
        return None
    return kinds.get(head, None if head == "ForImageClassification" else "CAUSAL_LM")


def batch_for(family: str, size: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    """Samples of unequal lengths, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    if family == "ViT":
        return {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator), "labels": torch.arange(size) % 2}
    ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(size):
        mask[row, length - 2 * (row % 4) :] = 0
    ids = ids.masked_fill(mask == 0, 0)
    batch = {"input_ids": ids, "attention_mask": mask}
    kind = FAMILIES[family][0]
    if kind == "ForSequenceClassification":
        batch["labels"] = torch.arange(size) % 2
    elif kind == "ForConditionalGeneration":
        labels = torch.randint(3, VOCABULARY, (size, 6), generator=generator)
        labels[1, 2:] = -100
        batch["labels"] = labels
    else:
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    return batch


def activations_of(model: Any, family: str) -> list[tuple[str, nn.Module]]:
    """The activation modules, named by hand in the table above."""
    ending = FAMILIES[family][2]
    found = [(name, module) for name, module in model.named_modules() if name.endswith(f".{ending}")]
    return [(name, module) for name, module in found if "pooler" not in name and "classifier" not in name]


def density_by_hand(model: Any, family: str, batch: dict, call: Callable[[], Any], eps: float = EPS) -> tuple[Any, Any]:
    """What `call` returns, and D: sample by sample, layer by layer, with autograd's own operations."""
    outputs: list[tuple[str, torch.Tensor]] = []
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.append((name, output)))
        for name, module in activations_of(model, family)
    ]
    try:
        result = call()
    finally:
        for handle in handles:
            handle.remove()
    stacks: dict[str, dict[str, list[torch.Tensor]]] = {}
    for name, a in outputs:
        decoder = FAMILIES[family][0] == "ForConditionalGeneration" and "decoder" in name
        real = batch["labels"] != -100 if decoder else batch.get("attention_mask")
        samples = []
        if a.dim() == 2 and real is not None:  # OPT's tokens in one row
            a = a.reshape(*real.shape, -1)
        for row in range(a.shape[0]):
            tokens = a[row] if real is None else a[row][real[row].bool()]
            samples.append((tokens.float() ** 2 / (tokens.float() ** 2 + eps)).mean())
        stacks.setdefault("decoder" if decoder else "first", {}).setdefault(name, []).append(
            sum(samples) / len(samples)
        )
    total = 0.0
    for layers in stacks.values():
        per_layer = [sum(values) / len(values) for values in layers.values()]
        total = total + sum(per_layer) / len(per_layer)
    return result, total


def reference(
    model: Any, family: str, batch: dict, weight: float = WEIGHT, eps: float = EPS
) -> dict[str, torch.Tensor]:
    """Gradients of loss + weight * D."""
    model.zero_grad()
    output, density = density_by_hand(model, family, batch, lambda: model(**batch), eps)
    (output.loss + weight * density).backward()
    return gradients(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    model.zero_grad()
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rtol: float = 1e-3) -> None:
    """Equal up to rounding, relative to the largest entry of all, and not for lack of any."""
    assert found.keys() == wanted.keys()
    assert found
    scale = max(value.abs().max().item() for value in wanted.values())
    assert scale > 0
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=1e-5 * scale, msg=lambda text, at=name: f"{at}: {text}"
        )


def attached(model: Any, **settings: Any) -> ActivationDensityLoss:
    return ActivationDensityLoss(**({"weight": WEIGHT, "eps": EPS} | settings)).attach(model)
