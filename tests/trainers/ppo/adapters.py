"""Adapters of PEFT and ours on the tiny policy."""

from collections.abc import Callable

from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig

from peft_dynamic import DensityLoRAConfig, DyLoRAConfig, LorettaAdpConfig, LorettaRepConfig, MoSLoRAConfig

TASK = {"task_type": "CAUSAL_LM"}
LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, **TASK, **LINEAR),
    "dora": lambda: LoraConfig(r=4, use_dora=True, **TASK, **LINEAR),
    "vera": lambda: VeraConfig(r=8, target_modules=["q_proj", "o_proj"], **TASK),
    "ia3": lambda: IA3Config(feedforward_modules=["down_proj"], **TASK, **LINEAR),
    "prompt-tuning": lambda: PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "prefix-tuning": lambda: PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "dylora": lambda: DyLoRAConfig(r=8, ranks=[2, 4, 8], **TASK, **LINEAR),
    "moslora": lambda: MoSLoRAConfig(r=4, **TASK, **LINEAR),
    "density-lora": lambda: DensityLoRAConfig(r=4, **TASK, **LINEAR),
    "loretta-rep": lambda: LorettaRepConfig(bottleneck=4, tensor_rank=2, target_modules=["q_proj", "v_proj"], **TASK),
    "loretta-adp": lambda: LorettaAdpConfig(bottleneck=8, tensor_rank=2, **TASK),
}
