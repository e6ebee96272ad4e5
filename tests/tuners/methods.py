"""Every tuner of ours on a small language model, for tests of what all of them must do."""

from collections.abc import Callable
from typing import Any

from peft import PeftConfig, get_peft_model

from peft_dynamic import DensityLoRAConfig, DyLoRAConfig, LorettaAdpConfig, LorettaRepConfig, MoSLoRAConfig
from tests.tuners.common import tiny_llama

RANKED = {"r": 8, "ranks": [1, 2, 4, 8], "target_modules": "all-linear", "rank_sampling": "uniform"}
METHODS: dict[str, Callable[[], PeftConfig]] = {
    "dylora": lambda: DyLoRAConfig(task_type="CAUSAL_LM", **RANKED),
    "dylora-frozen": lambda: DyLoRAConfig(task_type="CAUSAL_LM", truncation="prefix", update="frozen", **RANKED),
    "dylora-mixer": lambda: DyLoRAConfig(task_type="CAUSAL_LM", use_mixer=True, **RANKED),
    "moslora": lambda: MoSLoRAConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
    "density-lora": lambda: DensityLoRAConfig(
        task_type="CAUSAL_LM", r=8, target_modules="all-linear", density_eps=1e-4
    ),
    "loretta-rep": lambda: LorettaRepConfig(
        task_type="CAUSAL_LM", bottleneck=4, tensor_rank=2, target_modules=["q_proj", "v_proj"]
    ),
    "loretta-rep-noise": lambda: LorettaRepConfig(
        task_type="CAUSAL_LM",
        bottleneck=4,
        tensor_rank=2,
        target_modules=["q_proj", "v_proj"],
        init_weights="noise_removal",
    ),
    "loretta-adp": lambda: LorettaAdpConfig(task_type="CAUSAL_LM", bottleneck=8, tensor_rank=2),
}
# Refused, since what a block computes is without gradients there: design, not a defect.
REFUSES_REENTRANT = {"density-lora"}
# Hooks that read the pass and its mask are not traced; what is between them is.
COMPILES_IN_PARTS = {"density-lora"}


def with_method(name: str) -> Any:
    """A PeftModel of the tiny Llama."""
    return get_peft_model(tiny_llama(), METHODS[name]())
