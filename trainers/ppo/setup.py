"""Checks of what PPOTrainer is given, before anything is trained, and the loading of models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM

from peft_dynamic.trainers.ppo.completions import Generator
from peft_dynamic.trainers.ppo.config import PPOConfig
from peft_dynamic.trainers.ppo.reference import is_peft

# What a reward function is given beside the dataset's columns. `completion` and `completion_ids` of a dataset are left
# out, as GRPOTrainer leaves them out.
RESERVED = {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}


def seed_of(*parts: int) -> int:
    """One seed of several numbers: another one for other numbers, and the same in every process.

    Not `hash`, for which -1 and -2 are the same.
    """
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def hidden_width(policy: Any) -> int:
    """The width of the states that the head reads: not `hidden_size` in an OPT that projects them first."""
    head = policy.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is not None and weight.dim() == 2 and weight.is_floating_point():
        return int(weight.shape[-1])
    return int(getattr(head, "in_features", policy.config.get_text_config().hidden_size))


def check_arguments(model: Any, args: PPOConfig, peft_config: Any) -> None:
    """Raise where the arguments contradict each other or what PPOTrainer can do."""
    if not isinstance(args, PPOConfig):
        raise TypeError(f"args is a {type(args).__name__}; pass a PPOConfig.")
    if peft_config is not None and is_peft(model):
        raise ValueError("peft_config is for a bare model, and this one has an adapter already: pass one or the other.")


def check_dataset(dataset: Any) -> None:
    """Raise unless it has a length, rows, and prompts that are text or conversations."""
    if dataset is None:
        return
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"The dataset is a {type(dataset).__name__}, which has no length and cannot be read twice, so a run could "
            "not be resumed. Pass one with a length, such as Dataset.from_list(list(rows))."
        )
    if not len(dataset):
        raise ValueError("The dataset has no rows.")
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    if "prompt" not in columns:
        raise ValueError(f"The dataset has the columns {columns} and no `prompt`. Rename the one with the prompts.")
    if taken := sorted(set(columns) & RESERVED):
        raise ValueError(
            f"The dataset has a column `{taken[0]}`, which PPOTrainer passes to the reward functions itself: the "
            f"column would take its place. Rename it with dataset.rename_column({taken[0]!r}, ...), or drop it."
        )
    prompt = dataset[0]["prompt"]
    if not isinstance(prompt, str | list):
        raise ValueError(
            f"The `prompt` of the first row is a {type(prompt).__name__}; it must be text or a list of messages. "
            "PPOTrainer tokenises by itself."
        )


def load_model(name: str, args: PPOConfig) -> Any:
    """A model by name or path; float32 unless told otherwise, as TRL's trainers do. An adapter's path loads both."""
    settings = {"dtype": "float32", **as_dict(args.model_init_kwargs)}
    if (Path(name) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **settings)
    return AutoModelForCausalLM.from_pretrained(name, **settings)


def disable_dropout(model: nn.Module) -> None:
    """Set the dropouts to 0, and those that are numbers for `functional.dropout`, as in OPT and BLOOM."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def as_dict(setting: Any) -> dict[str, Any]:
    """A setting that TrainingArguments has turned from JSON text into a dict."""
    assert setting is None or isinstance(setting, dict)
    return setting or {}


def make_generator(model: Any, policy: Any, tokenizer: Any, args: PPOConfig) -> Generator:
    """The generator for a policy, with all tokens that end its completions."""
    stop_ids: list[int] = []
    if args.stop_token_id is not None:
        stop_ids = [args.stop_token_id]
    elif args.stop_token == "eos":
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer has no EOS token, so no completion could ever end. Set tokenizer.eos_token, or "
                "PPOConfig(stop_token_id=...), or PPOConfig(stop_token=None) for completions of a fixed length."
            )
        declared = policy.generation_config.eos_token_id
        declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
        stop_ids = list(dict.fromkeys([tokenizer.eos_token_id, *declared]))
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    return Generator(
        tokenizer,
        stop_ids,
        args.stop_strings or [],
        args.max_completion_length,
        args.temperature,
        context,
        is_peft(model) and model.active_peft_config.is_prompt_learning,
        as_dict(args.chat_template_kwargs),
    )
