"""Every tuner of ours on a small language model, for tests of what all of them must do."""

from typing import Any

from peft import get_peft_model

from tests import methods
from tests.tuners.common import tiny_llama

METHODS = methods.configs(
    "all-linear",
    variations=("dylora-frozen", "dylora-mixer", "lamda", "loretta-rep-noise"),
    own={
        "dylora": {"r": 8, "ranks": [1, 2, 4, 8], "rank_sampling": "uniform"},
        "moslora": {"r": 8},
        "density-lora": {"r": 8, "density_eps": 1e-4},
        "loretta-rep": {"target_modules": ["q_proj", "v_proj"]},
    },
    task_type="CAUSAL_LM",
)
# Refused, since what a block computes is without gradients there: design, not a defect.
REFUSES_REENTRANT = {"density-lora"}
# Hooks that read the pass and its mask are not traced; what is between them is.
COMPILES_IN_PARTS = {"density-lora"}


def with_method(name: str, layers: int = 2) -> Any:
    """A PeftModel of the tiny Llama."""
    return get_peft_model(tiny_llama(layers=layers), METHODS[name]())
