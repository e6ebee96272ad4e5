"""Settings of PPO, under the names of TRL 1.12's PPOConfig, or else of GRPOConfig, where they mean the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from peft_dynamic.functional.ppo import KL_ESTIMATORS
from peft_dynamic.rules import FLAG, TEXT, Rule, check_rules, is_finite, is_int, is_number, or_none

_INT: Rule = ("an int", is_int)
_NUMBER: Rule = ("a finite number", lambda value: is_finite(value) or value != value)  # NaN is in no range
_WHOLE = or_none("an int of at least 0", lambda value: is_int(value) and value >= 0)
_DICT = or_none("a dict, or the JSON of one", lambda value: isinstance(value, Mapping))
# What a value is; __post_init__ has the ranges of numbers.
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("max_completion_length", "rollout_forward_batch_size", "num_ppo_epochs", "num_mini_batches"), _INT
    ),
    **dict.fromkeys(("temperature", "kl_coef", "vf_coef", "gamma", "lam", "kl_horizon"), _NUMBER),
    # infinity leaves a clipping out
    **dict.fromkeys(("cliprange", "cliprange_value"), ("a number", is_number)),
    **dict.fromkeys(("kl_target", "target_kl", "missing_eos_penalty"), or_none("a finite number", is_finite)),
    **dict.fromkeys(("stop_token_id", "num_completions_to_print"), _WHOLE),
    **dict.fromkeys(("bootstrap_truncated", "shuffle_dataset", "whiten_rewards", "whiten_advantages"), FLAG),
    **dict.fromkeys(("disable_dropout", "eval_do_sample", "log_completions"), FLAG),
    **dict.fromkeys(("chat_template_kwargs", "model_init_kwargs"), _DICT),
    "ref_adapter_name": TEXT,
    "reward_weights": or_none("a list of finite numbers", lambda value: _is_list(value, is_finite)),
}


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(holds, value))


@dataclass
class PPOConfig(TrainingArguments):
    """`TrainingArguments` with the settings of PPO.

    An optimizer step trains on `per_device_train_batch_size * gradient_accumulation_steps` completions of each process.
    A rollout has `num_mini_batches` times as many and is gone through `num_ppo_epochs` times, so it gives
    `num_mini_batches * num_ppo_epochs` optimizer steps, which is what `max_steps`, `save_steps` and the rest count.

    Defaults other than those of `TrainingArguments`: `learning_rate` 3e-6, `logging_steps` 10, `remove_unused_columns`
    False (all columns reach the reward functions).

    Raises:
        ValueError: a setting is out of its range.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "chat_template_kwargs",
    ]

    learning_rate: float = field(default=3e-6, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Keep only the `prompt` column: reward functions then see no other."}
    )

    # The rollout
    max_completion_length: int = field(default=53, metadata={"help": "The most tokens that a completion may have."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the policy: it is sampled, trained and compared at it."}
    )
    stop_token: str | None = field(
        default="eos",
        metadata={
            "help": "'eos' ends a completion at the tokenizer's EOS and at those of the model's generation_config; "
            "None does not, and completions without `stop_token_id` or `stop_strings` all have the full length."
        },
    )
    stop_token_id: int | None = field(
        default=None, metadata={"help": "End a completion at this token instead of the EOS ones."}
    )
    stop_strings: list[str] | None = field(
        default=None, metadata={"help": "End a completion also where its text contains one of these."}
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Taken off the score of a completion that was cut off: positive, on top of the rewards."},
    )
    bootstrap_truncated: bool = field(
        default=False,
        metadata={
            "help": "Whether a completion that was cut off is unfinished: its score does not count, and the value of "
            "what would have come next stands in for it. False: the score of the cut-off text is its outcome. Without "
            "any stop token the full length is the end, whatever is set here."
        },
    )
    rollout_forward_batch_size: int = field(
        default=64,
        metadata={"help": "Completions that are generated, and scored, at a time on each device, without gradients."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments for the chat template, for prompts that are conversations."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts, anew in each epoch."})

    # The rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "A factor for each reward function; None for 1 each."}
    )
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Scale the rewards per token to standard deviation 1, leaving their mean."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Scale the advantages of a rollout to mean 0 and standard deviation 1."}
    )
    kl_coef: float = field(
        default=0.05, metadata={"help": "Factor of the KL penalty per token; 0 leaves the reference policy out."}
    )
    kl_estimator: str = field(default="k1", metadata={"help": "How the KL of a token is estimated: 'k1' or 'k3'."})
    kl_target: float | None = field(
        default=None, metadata={"help": "Adapt `kl_coef` to hold the KL per completion here; None leaves it fixed."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Completions over which `kl_coef` adapts."})
    ref_adapter_name: str | None = field(
        default=None,
        metadata={"help": "An adapter of the PeftModel that is the reference policy, instead of the bare base model."},
    )

    # The update
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in each pass over a rollout."})
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Once `approx_kl` of an optimizer step is above this, the rollout's remaining steps are counted "
            "but not computed; None computes all."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of the generalized advantage estimation."})
    cliprange: float = field(default=0.2, metadata={"help": "How far a token's probability ratio may move from 1."})
    cliprange_value: float = field(default=0.2, metadata={"help": "How far a value may move from its old one."})
    vf_coef: float = field(default=0.1, metadata={"help": "Factor of the value loss."})

    # The model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments for `from_pretrained` where `model` is a string."}
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set every dropout to 0, so that a probability ratio of 1 means an unchanged policy."},
    )

    # What is logged
    eval_do_sample: bool = field(
        default=False, metadata={"help": "Sample in evaluations, as in training; otherwise decode greedily."}
    )
    log_completions: bool = field(
        default=False,
        metadata={"help": "Print completions at each log and write them to `output_dir`/completions as Parquet."},
    )
    num_completions_to_print: int | None = field(
        default=8, metadata={"help": "Completions to print at a log; None for all. The file always has all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rules(self, RULES)
        positive = ("max_completion_length", "temperature", "rollout_forward_batch_size", "num_ppo_epochs")
        for name in (*positive, "num_mini_batches", "kl_horizon", "cliprange", "cliprange_value"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        for name in ("kl_coef", "vf_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or above, and finite.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in 0..1.")
        for name in ("kl_target", "target_kl", "missing_eos_penalty"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0, or None to leave it out.")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator={self.kl_estimator!r} must be one of {KL_ESTIMATORS}.")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(f"kl_target={self.kl_target} adapts kl_coef, which never leaves 0: start above it.")
        if self.target_kl is not None and self.fp16:
            raise ValueError(
                f"target_kl={self.target_kl} leaves optimizer steps without a gradient, which the loss scaling of fp16 "
                "does not allow. Set bf16=True in its place, or target_kl=None."
            )
        if self.stop_token not in ("eos", None):
            raise ValueError(
                f"stop_token={self.stop_token!r} must be 'eos' or None. Name another token by stop_token_id, and a "
                "text by stop_strings."
            )
        words = self.stop_strings
        if words is not None and not _is_list(words, lambda word: isinstance(word, str) and bool(word)):
            raise ValueError(f"stop_strings={words!r} must be a list of non-empty strings.")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True would change the size of a rollout on the way; set it to False."
            )

    @property
    def steps_per_rollout(self) -> int:
        """Micro-batches, forward and backward passes of each process, that are trained on one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches * self.gradient_accumulation_steps

    @property
    def rollout_size(self) -> int:
        """Completions of one rollout, on each process."""
        return self.num_mini_batches * self.gradient_accumulation_steps * self.train_batch_size
