"""Every method of ours, for the suites that are parametrised by them: its row, and its adapter on a tiny model.

A new method is one row here. A suite that needs other settings passes them on; it never lists the methods itself.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from peft_dynamic.methods import METHODS, Method

# What each method needs to be small, on a model of any kind; names of modules are the suite's.
SMALL: dict[str, dict[str, Any]] = {
    "DYLORA": {"r": 4, "ranks": [1, 2, 4]},
    "QDYLORA": {"r": 4, "ranks": [1, 2, 4]},
    "MOSLORA": {"r": 4},
    "LORETTA_REP": {"bottleneck": 4, "tensor_rank": 2},
    "LORETTA_ADP": {"bottleneck": 8, "tensor_rank": 2},
    "DENSITY_LORA": {"r": 4},
    "SCALEARN": {"r": 4},  # of its sources together
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
    "scalearn-shared": ("SCALEARN", {"shape": "scalar", "shared": True}),
}
QUANTISED = {"QDYLORA"}  # need a quantised base model, and a test of their own
SOURCED = {"SCALEARN"}  # need finished adapters of the base model, so a suite has to say which that is
# What a configuration cannot be made without.
LEAST: dict[str, dict[str, Any]] = {"SCALEARN": {"adapters": {"one": "a"}, "sources": {"a": {"one": 1}}}}
OF_SOURCES = ("r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern")


def word(method: Method) -> str:
    """How tests call a method: "loretta-rep"."""
    return method.name.lower().replace("_", "-")


def method_of(name: str) -> Method:
    """The row of a method, or of a variation's."""
    return METHODS[VARIATIONS[name][0] if name in VARIATIONS else name.upper().replace("-", "_")]


def configs(
    targets: Any = ("q_proj", "v_proj"),
    *,
    variations: Iterable[str] = (),
    lora: bool | None = None,
    quantised: bool = False,
    small: bool = True,
    sources: Callable[[], nn.Module] | None = None,
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
        sources: makes the base model, for methods that stand on finished adapters; None to leave those methods out.
        own: name -> settings of one method and its variations, or of one variation.
        settings: of all.
    """
    own = own or {}
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        word(method): (name, {})
        for name, method in METHODS.items()
        if (quantised or name not in QUANTISED) and (sources is not None or name not in SOURCED)
    }
    wanted |= {key: VARIATIONS[key] for key in variations}
    assert own.keys() <= wanted.keys()
    return {
        key: _maker(
            METHODS[name],
            targets,
            (SMALL[name] if small else {}) | rule | settings | {**own.get(word(METHODS[name]), {}), **own.get(key, {})},
            sources,
        )
        for key, (name, rule) in wanted.items()
        if lora is None or bool(METHODS[name].engines) == lora
    }


def _maker(
    method: Method, targets: Any, settings: dict[str, Any], base: Callable[[], nn.Module] | None
) -> Callable[..., PeftConfig]:
    where = (
        {"target_modules": targets if isinstance(targets, str) else list(targets)} if method.engines and targets else {}
    )
    if method.name in SOURCED:
        assert base is not None
        return lambda **more: over_sources(method, base, where | settings | more)
    return lambda **more: method.config(**(where | settings | more))


def over_sources(method: Method, base: Callable[[], nn.Module], settings: Mapping[str, Any]) -> PeftConfig:
    """A configuration over two LoRA adapters, which share what `settings` say of factors; without dropout of omega."""
    of_sources = {name: settings[name] for name in OF_SOURCES if settings.get(name)}
    rest = {name: value for name, value in settings.items() if name not in OF_SOURCES}
    with tempfile.TemporaryDirectory() as folder:  # which the adapter does without from then on
        for name, files in sources_of(base, of_sources).items():
            Path(folder, name).mkdir()
            for file, content in files.items():
                Path(folder, name, file).write_bytes(content)
        adapters = {name: str(Path(folder, name)) for name in ("first", "second")}
        return method.config(**({"omega_dropout": 0.0, "adapters": adapters} | rest))


_MADE: dict[tuple[Any, str], dict[str, dict[str, bytes]]] = {}


def sources_of(base: Callable[[], nn.Module], settings: Mapping[str, Any]) -> dict[str, dict[str, bytes]]:
    """Two finished LoRA adapters of a model, with half of each rank: name -> its files. Made once a process."""
    key = (base, repr(sorted(settings.items())))
    if key in _MADE:
        return _MADE[key]
    ranks = {pattern: max(rank // 2, 1) for pattern, rank in settings.get("rank_pattern", {}).items()}
    halved = {"r": settings.get("r", 8) // 2, "rank_pattern": ranks, "init_lora_weights": False}
    _MADE[key] = {}
    for seed, name in enumerate(("first", "second")):
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")  # of PEFT's, which the test that uses the sources is not about
            model = base()
            torch.manual_seed(seed)
            get_peft_model(model, LoraConfig(**{**settings, **halved})).save_pretrained(folder)
            _MADE[key][name] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return _MADE[key]
