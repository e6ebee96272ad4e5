"""Every tuner of ours on a small language model, for tests of what all of them must do."""

from collections.abc import Callable
from functools import partial
from typing import Any

from peft import PeftConfig, get_peft_model
from torch import nn

from tests import methods
from tests.tuners.common import tiny_llama


def methods_on(base: Callable[[], nn.Module]) -> dict[str, Callable[..., PeftConfig]]:
    """Name -> a function that makes the configuration, for a model with the names of Llama."""
    return methods.configs(
        "all-linear",
        variations=("dylora-frozen", "dylora-mixer", "lamda", "loretta-rep-noise", "scalearn-shared"),
        sources=base,
        own={
            "dylora": {"r": 8, "ranks": [1, 2, 4, 8], "rank_sampling": "uniform"},
            "moslora": {"r": 8},
            "density-lora": {"r": 8, "density_eps": 1e-4},
            "loretta-rep": {"target_modules": ["q_proj", "v_proj"]},
            "scalearn": {"r": 8},
        },
        task_type="CAUSAL_LM",
    )


EVERY = methods_on(tiny_llama)
# A variation that an engine might compute otherwise; elsewhere its own tests have it.
OF_ENGINES = ["scalearn-shared"]
METHODS = {name: maker for name, maker in EVERY.items() if name not in OF_ENGINES}
# Refused, since what a block computes is without gradients there: design, not a defect.
REFUSES_REENTRANT = {"density-lora"}
# Hooks that read the pass and its mask are not traced; what is between them is.
COMPILES_IN_PARTS = {"density-lora"}
# No factors for what their sources did not have: copies of layers among it.
OF_SOURCES = {"scalearn"}


def with_method(name: str, layers: int = 2) -> Any:
    """A PeftModel of the tiny Llama."""
    makers = EVERY if layers == 2 else methods_on(partial(tiny_llama, layers=layers))
    return get_peft_model(tiny_llama(layers=layers), makers[name]())
