"""One tiny model with random weights of each family, six layers deep, in float32."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

DEPTH, VOCABULARY = 6, 67

_SIZES = {
    "num_hidden_layers": DEPTH,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GATED = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}


def _of(name: str, sizes: dict[str, Any], **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(transformers, f"{name}Config")(**{**sizes, **more})
        kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name.removesuffix('Text')}ForCausalLM")
        return getattr(transformers, kind)(config)

    return make


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _of("Llama", _GATED),
    "qwen2": _of("Qwen2", _GATED, use_sliding_window=True, sliding_window=3, max_window_layers=2),
    "qwen3": _of("Qwen3", _GATED, head_dim=8),
    "mistral": _of("Mistral", _GATED, sliding_window=4),
    "gemma": _of("Gemma", _GATED, head_dim=8),
    "gemma2": _of("Gemma2", _GATED, head_dim=8, sliding_window=4, final_logit_softcapping=2.0),
    "gemma3": _of(
        "Gemma3Text", _GATED, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 3
    ),
    "phi": _of("Phi", _GATED, num_key_value_heads=4),
    "phi3": _of("Phi3", _GATED),
    "olmo": _of("Olmo", _GATED),
    "olmo2": _of("Olmo2", _GATED),
    "gpt2": _of("GPT2", _SIZES),
    "opt": _of("OPT", _SIZES, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=True),
    "gpt_neox": _of("GPTNeoX", _SIZES, intermediate_size=48),
    "falcon": _of("Falcon", _SIZES),
    "falcon-alibi": _of("Falcon", _SIZES, alibi=True, new_decoder_architecture=False, multi_query=False),
    "bloom": _of("Bloom", _SIZES),
    "cohere": _of("Cohere", _GATED, logit_scale=0.25),
    "granite": _of("Granite", _GATED, logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0),
    "gptj": _of("GPTJ", {"n_layer": DEPTH, "n_embd": 32, "n_head": 4, "vocab_size": VOCABULARY, "rotary_dim": 4}),
    "mpt": _of("Mpt", {"n_layers": DEPTH, "d_model": 32, "n_heads": 4, "vocab_size": VOCABULARY}),
}


def build(name: str, seed: int = 0) -> Any:
    """The model in eval mode, its weights large enough for each layer to matter."""
    torch.manual_seed(seed)
    model = FAMILIES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def layers_of(model: Any) -> nn.ModuleList:
    """The list of layers, found without the code under test."""
    for name in ("model.layers", "transformer.h", "model.decoder.layers", "gpt_neox.layers", "transformer.blocks"):
        try:
            return model.get_submodule(name)
        except AttributeError:
            continue
    raise AssertionError(f"{type(model).__name__}: no layers")


def cut(model: Any, exit: int) -> Any:
    """The model with its layers after `exit` deleted: the plain reference. It changes the model."""
    layers = layers_of(model)
    del layers[exit:]
    config = model.config
    config.num_hidden_layers = exit
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:exit]
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
