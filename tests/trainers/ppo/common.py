"""A tiny policy, its tokenizer with pad == eos, and a trainer of both."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from peft_dynamic.trainers import PPOConfig, PPOTrainer

LETTERS = "abcdefghijklmnop"
EOS = 16  # and padding
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """One token per letter; the end and the padding are the same token, as in SmolLM2."""
    words = {letter: number for number, letter in enumerate(LETTERS)} | {"<e>": EOS}
    plain = Tokenizer(models.WordLevel(words, unk_token="<e>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    plain.decoder = decoders.Fuse()
    settings = {"eos_token": "<e>", "pad_token": "<e>"} | settings
    made = PreTrainedTokenizerFast(tokenizer_object=plain, **{k: v for k, v in settings.items() if v is not None})
    made.chat_template = CHAT
    return made


def tiny_policy(vocabulary: int = 17, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    set_seed(seed)
    defaults = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "bos_token_id": None,
        "initializer_range": 0.2,  # so that a frozen head leaves room for sharp distributions
    }
    return LlamaForCausalLM(LlamaConfig(**(defaults | settings)))


# Of every trainer in these tests: on the CPU, and without files, bars and services.
QUIET = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def config(folder: Path, **settings: Any) -> PPOConfig:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_completion_length": 5,
        "max_steps": 4,
        "learning_rate": 1e-2,
        **QUIET,
    }
    return PPOConfig(str(folder), **(defaults | settings))


def prompts(number: int = 8) -> Dataset:
    """Of lengths 1 to 4, with another column."""
    rows = [{"prompt": LETTERS[i % 16] * (1 + i % 4), "wanted": LETTERS[(i + 1) % 16]} for i in range(number)]
    return Dataset.from_list(rows)


def early_letters(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """1 for a's, 0 for the end, and between for the other letters; averaged over a completion."""
    return [1 - sum(ids) / (EOS * len(ids)) for ids in completion_ids]


def trainer(folder: Path, model: Any = None, reward_funcs: Any = early_letters, **settings: Any) -> PPOTrainer:
    names = (
        "train_dataset",
        "eval_dataset",
        "peft_config",
        "ref_model",
        "value_model",
        "callbacks",
        "processing_class",
        "rollout_func",
    )
    own = {name: settings.pop(name) for name in names if name in settings}
    own.setdefault("train_dataset", prompts())
    own.setdefault("processing_class", tokenizer())
    return PPOTrainer(model or tiny_policy(), reward_funcs, config(folder, **settings), **own)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
