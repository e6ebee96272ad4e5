"""Adapters of PEFT and ours on the tiny policy."""

from collections.abc import Callable

from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig

from tests import methods

TASK = {"task_type": "CAUSAL_LM"}
LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, **TASK, **LINEAR),
    "dora": lambda: LoraConfig(r=4, use_dora=True, **TASK, **LINEAR),
    "vera": lambda: VeraConfig(r=8, target_modules=["q_proj", "o_proj"], **TASK),
    "ia3": lambda: IA3Config(feedforward_modules=["down_proj"], **TASK, **LINEAR),
    "prompt-tuning": lambda: PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "prefix-tuning": lambda: PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    **methods.configs(
        LINEAR["target_modules"],
        own={"dylora": {"r": 8, "ranks": [2, 4, 8]}, "loretta-rep": {"target_modules": ["q_proj", "v_proj"]}},
        **TASK,
    ),
}
