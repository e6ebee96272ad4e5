"""The table of methods: one row says all that the rest of the package has to know about an adapter method.

Registration with PEFT, model cards, exports, the tables of the docs and the tests' parametrisation are made from it. A
new method is its folder under `tuners/`, its row here, and its page.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Who can read a LoRA that was exported: PEFT itself, vLLM, and llama.cpp's converter.
LORA_ENGINES = ("peft", "vllm", "llama.cpp")

# The variants of LoRA that PEFT has: the field that asks for one, and how the names of its classes begin. One that is
# not here is refused by every method; tests/hosts/test_peft.py compares the list with PEFT's.
VARIANTS = {
    "use_dora": ("Dora", "_DoraConv"),
    "use_qalora": ("QALora",),
    "use_bdlora": ("BdLora",),
    "velora_config": ("Velora",),
    "alora_invocation_tokens": ("ALora",),
    "monteclora_config": ("Monteclora",),
    "arrow_config": ("Arrow",),
    "kasa_config": ("Kasa",),
    "init_lora_weights": ("MiCA",),
}

# Fields of `LoraConfig` that a method cannot honour: field -> {method: the reason}. What is not here is honoured, if
# `tuners/lora_fields.py` has a rule for it; a field that has none, of a newer PEFT, is refused by all.
REFUSED: dict[str, dict[str, str]] = {
    "use_rslora": {
        "DYLORA": "DyLoRA's scale follows the rank in use; pass scaling='alpha/sqrt(b)' for the rank-stabilised scale",
        "SCALEARN": "the scale of each source is in its stored factors",
    },
    "use_dora": {
        "DYLORA": "DoRA's magnitudes belong to the norm of one merged weight, and each rank has its own",
        "LORETTA_REP": "it was not tried with factors that are tensor trains",
        "SCALEARN": "DoRA's magnitudes belong to the norm of one merged weight, and the sources have none",
    },
    "use_qalora": {
        "DYLORA": "its pooled inputs give lora_A another shape than the cut to a rank expects",
        "MOSLORA": "its pooled inputs give lora_A another shape than the mixer expects",
        "LORETTA_REP": "its pooled inputs give lora_A another shape than the tensor train's",
        "SCALEARN": "the factors are those of the sources, whose inputs are not pooled",
    },
    "use_bdlora": {
        "DYLORA": "its blocks cut across the rank, so a part of the rank is not an adapter",
        "MOSLORA": "its blocks cut across the rank, which the mixer mixes",
        "LORETTA_REP": "its blocks cut the factors, which are tensor trains",
        "SCALEARN": "the factors are those of the sources, which have no blocks",
    },
    "velora_config": {
        "DYLORA": "it replaces the forward pass of lora_A, which DyLoRA cuts to a rank",
        "MOSLORA": "it replaces the forward pass of lora_A, of which the mixer is a part",
        "LORETTA_REP": "it replaces the forward pass of lora_A, which is a tensor train",
        "SCALEARN": "the factors are those of the sources, and lora_A is not trained",
    },
    "alora_invocation_tokens": {
        "DYLORA": "it replaces the forward pass of the layer that DyLoRA cuts to a rank",
        "MOSLORA": "it was not tried with a mixer",
        "LORETTA_REP": "it was not tried with factors that are tensor trains",
        "SCALEARN": "it was not tried with learned scales",
    },
    "monteclora_config": {
        "DYLORA": "it replaces the forward pass of the layer that DyLoRA cuts to a rank",
        "MOSLORA": "it has a mixture of its own between the factors",
        "LORETTA_REP": "it has a mixture of its own between the factors",
        "SCALEARN": "it has a mixture of its own between the factors",
    },
    "arrow_config": {
        "DYLORA": "it routes between finished adapters; export one rank of each with export_lora and route those",
        "MOSLORA": "it routes by the stored factors; export each adapter with export_lora and route those",
        "LORETTA_REP": "it routes by stored factors; export each adapter with export_lora and route those",
        "DENSITY_LORA": "it routes between the adapters of a model that create_arrow_model made",
        "SCALEARN": "it routes by stored factors; export each adapter with export_lora and route those",
    },
    "kasa_config": {
        "DYLORA": "its singular values are tied to one rank",
        "MOSLORA": "it has singular values of its own between the factors",
        "LORETTA_REP": "it has singular values of its own between the factors",
        "SCALEARN": "it has singular values of its own between the factors",
    },
    "megatron_config": {
        "DYLORA": "Megatron's parallel linear layers cannot be cut to a rank",
        "MOSLORA": "Megatron's parallel linear layers hold parts of the factors only",
        "LORETTA_REP": "Megatron's parallel linear layers hold parts of the factors only",
        "DENSITY_LORA": "Megatron's parallel layers were not tried with a density loss",
        "SCALEARN": "Megatron's parallel linear layers hold parts of the factors only",
    },
    "loftq_config": {
        "DYLORA": "it fits the quantisation error at one rank and one scale",
        "MOSLORA": "it sets the factors so that B A is the quantisation error, and the update is B M A",
        "LORETTA_REP": "it sets the factors, which are tensor trains",
        "SCALEARN": "it sets the factors, which are those of the sources",
    },
    "eva_config": {
        "DYLORA": "EVA gives every layer a rank of its own after construction",
        "MOSLORA": "it chooses the factors after construction for B A, and the update is B M A",
        "LORETTA_REP": "it sets the factors, which are tensor trains",
        "SCALEARN": "it sets the factors, which are those of the sources",
    },
    "corda_config": {
        "DYLORA": "CorDA changes the base weights to fit one rank and one scale",
        "MOSLORA": "it changes the base weights to go with B A, and the update is B M A",
        "LORETTA_REP": "it sets the factors, which are tensor trains",
        "SCALEARN": "it sets the factors, which are those of the sources",
    },
    "lora_ga_config": {
        "DYLORA": "LoRA-GA changes the base weights to fit one rank and one scale",
        "MOSLORA": "it changes the base weights to go with B A, and the update is B M A",
        "LORETTA_REP": "it sets the factors, which are tensor trains",
        "SCALEARN": "it sets the factors, which are those of the sources",
    },
    "target_parameters": {
        "LORETTA_REP": "3-D expert parameters are no linear layers; list linear layers in target_modules",
    },
    "lora_bias": {
        "SCALEARN": "the sources are products of two factors, and have no biases",
    },
    "exclude_modules": {
        "SCALEARN": "the modules are those of the sources; leave them out of the sources",
    },
    "layers_to_transform": {
        "SCALEARN": "the modules are those of the sources; leave them out of the sources",
    },
    "layers_pattern": {
        "SCALEARN": "the modules are those of the sources; leave them out of the sources",
    },
    "layer_replication": {
        "SCALEARN": "the sources have no factors for the copies of layers",
    },
}


@dataclass(frozen=True)
class Method:
    """One adapter method.

    Attributes:
        name: its `PeftType`, as it stands in a checkpoint.
        title: how texts call it.
        folder: its module under `peft_dynamic.tuners`, which has the classes.
        classes: the names of its configuration and of its tuner.
        summary: what it is, for tables and model cards.
        paper: (authors and place, arXiv number).
        page: its page under docs/.
        engines: who can read what `export_lora` writes of it; empty for a method that has no form as a LoRA.
        not_lora: what such a method is instead.
        ranked: whether one adapter has many ranks, with `set_rank`.
        like: the method whose refused fields it shares; itself if empty.
    """

    name: str
    title: str
    folder: str
    classes: tuple[str, str]
    summary: str
    paper: tuple[str, str]
    page: str
    engines: tuple[str, ...] = LORA_ENGINES
    not_lora: str = ""
    ranked: bool = False
    like: str = field(default="", repr=False)

    @property
    def config(self) -> type:
        """The class of its configurations."""
        found: type = getattr(importlib.import_module(f"peft_dynamic.tuners.{self.folder}"), self.classes[0])
        return found

    @property
    def model(self) -> Any:
        """The class of its tuner."""
        return getattr(importlib.import_module(f"peft_dynamic.tuners.{self.folder}"), self.classes[1])

    @property
    def refused(self) -> dict[str, str]:
        """Field of `LoraConfig` -> why it is refused."""
        return {name: reasons[key] for name, reasons in REFUSED.items() if (key := self.like or self.name) in reasons}

    @property
    def tags(self) -> list[str]:
        """Of its model cards: its own name, after "lora" if it is a LoRA with something more."""
        return [*(["lora"] if self.engines else []), self.name.lower()]


_LORETTA = ("Yang et al., NAACL 2024", "2402.11417")
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "DYLORA",
            "DyLoRA",
            "dylora",
            ("DyLoRAConfig", "DyLoRAModel"),
            "one LoRA run, usable at any rank",
            ("Valipour et al., EACL 2023", "2210.07558"),
            "dylora.md",
            ranked=True,
        ),
        Method(
            "QDYLORA",
            "QDyLoRA",
            "qdylora",
            ("QDyLoRAConfig", "QDyLoRAModel"),
            "the same over a 4-bit or 8-bit base model",
            ("Rajabzadeh et al., EMNLP 2024", "2402.10462"),
            "dylora.md",
            ranked=True,
            like="DYLORA",
        ),
        Method(
            "MOSLORA",
            "MoSLoRA",
            "moslora",
            ("MoSLoRAConfig", "MoSLoRAModel"),
            "LoRA with a trained mixer between its factors",
            ("Wu et al., EMNLP 2024", "2406.11909"),
            "moslora.md",
        ),
        Method(
            "LORETTA_REP",
            "LoRETTA_rep",
            "loretta_rep",
            ("LorettaRepConfig", "LorettaRepModel"),
            "LoRA whose factors are tensor trains: 3 to 12 times fewer parameters",
            _LORETTA,
            "loretta.md",
        ),
        Method(
            "LORETTA_ADP",
            "LoRETTA_adp",
            "loretta_adp",
            ("LorettaAdpConfig", "LorettaAdpModel"),
            "bottleneck adapters made of tensor trains",
            _LORETTA,
            "loretta.md",
            engines=(),
            not_lora="small networks between the layers",
        ),
        Method(
            "DENSITY_LORA",
            "DensityLoRA",
            "density_lora",
            ("DensityLoRAConfig", "DensityLoRAModel"),
            "LoRA with a penalty on active neurons",
            ("Runwal et al., AAAI 2025", "2402.01911"),
            "density.md",
        ),
        Method(
            "SCALEARN",
            "ScaLearn",
            "scalearn",
            ("ScaLearnConfig", "ScaLearnModel"),
            "learned scales over finished adapters, which fold into one LoRA",
            ("Frohmann et al., Findings of ACL 2024", "2310.01217"),
            "scalearn.md",
        ),
    )
}


def method_of(config: Any) -> Method | None:
    """The row of an adapter's configuration; None if the method is not one of ours."""
    kind = config.get("peft_type") if isinstance(config, Mapping) else getattr(config, "peft_type", None)
    return METHODS.get(str(getattr(kind, "value", kind)))
