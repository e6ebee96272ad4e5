"""Every method of ours, for the suites that are parametrised by them: its row, and its adapter on a tiny model.

A new method is one row here. A suite that needs other settings passes them on; it never lists the methods itself.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft import PeftConfig

from peft_dynamic.methods import METHODS, Method

# What each method needs to be small, on a model of any kind; names of modules are the suite's.
SMALL: dict[str, dict[str, Any]] = {
    "DYLORA": {"r": 4, "ranks": [1, 2, 4]},
    "QDYLORA": {"r": 4, "ranks": [1, 2, 4]},
    "MOSLORA": {"r": 4},
    "LORETTA_REP": {"bottleneck": 4, "tensor_rank": 2},
    "LORETTA_ADP": {"bottleneck": 8, "tensor_rank": 2},
    "DENSITY_LORA": {"r": 4},
}
# The same with another rule: what is computed differs, what must hold does not.
VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dylora-paper": ("DYLORA", {"truncation": "prefix", "scaling": "alpha/b", "rank_sampling": "uniform"}),
    "dylora-frozen": ("DYLORA", {"truncation": "prefix", "update": "frozen"}),
    "dylora-mixer": ("DYLORA", {"use_mixer": True}),
    "lamda": (
        "MOSLORA",
        {
            "train_a": False,
            "freeze_b": 0.5,
            "total_steps": 8,
            "init_lora_weights": "spectral",
            "mixer_init": "zero",
            "lora_alpha": 4,
        },
    ),
    "loretta-rep-noise": ("LORETTA_REP", {"init_weights": "noise_removal"}),
}
QUANTISED = {"QDYLORA"}  # need a quantised base model, and a test of their own


def word(method: Method) -> str:
    """How tests call a method: "loretta-rep"."""
    return method.name.lower().replace("_", "-")


def configs(
    targets: Any = ("q_proj", "v_proj"),
    *,
    variations: Iterable[str] = (),
    lora: bool | None = None,
    quantised: bool = False,
    small: bool = True,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> dict[str, Callable[..., PeftConfig]]:
    """Name -> a function that makes the configuration, with further settings.

    Args:
        targets: `target_modules` of the methods that have to be told; None to leave them out.
        variations: those of `VARIATIONS` to have as well.
        lora: those that are a LoRA with something more, or those that are not; None for all.
        quantised: also those that are for a quantised base model.
        small: with what makes them small; else at their defaults.
        own: name -> settings of one method and its variations, or of one variation.
        settings: of all.
    """
    own = own or {}
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        word(method): (name, {}) for name, method in METHODS.items() if quantised or name not in QUANTISED
    }
    wanted |= {key: VARIATIONS[key] for key in variations}
    assert own.keys() <= wanted.keys()
    return {
        key: _maker(
            METHODS[name],
            targets,
            (SMALL[name] if small else {}) | rule | settings | {**own.get(word(METHODS[name]), {}), **own.get(key, {})},
        )
        for key, (name, rule) in wanted.items()
        if lora is None or bool(METHODS[name].engines) == lora
    }


def _maker(method: Method, targets: Any, settings: dict[str, Any]) -> Callable[..., PeftConfig]:
    where = (
        {"target_modules": targets if isinstance(targets, str) else list(targets)} if method.engines and targets else {}
    )
    return lambda **more: method.config(**(where | settings | more))
