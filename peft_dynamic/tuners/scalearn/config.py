"""Configuration of ScaLearn; the class docstring says what each field of PEFT's `LoraConfig` means here."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig
from peft.utils.peft_types import PeftType

from peft_dynamic.methods import METHODS
from peft_dynamic.rules import FLAG, Rule, check_rules, default_of, is_finite, is_int, or_none
from peft_dynamic.tuners.lora_fields import check_lora_fields, check_refused

REFUSED_FIELDS = METHODS["SCALEARN"].refused
SHAPES = ("vector", "scalar")
# What the sources say, and nobody else may.
DERIVED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters")


def _is_adapters(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and name and isinstance(place, str | os.PathLike) for name, place in value.items()
    )


def _is_ranks(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and is_int(rank) and rank >= 1 for name, rank in value.items()
    )


def _is_sources(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(_is_ranks(of_one) and of_one for of_one in value.values())


RULES: dict[str, Rule] = {
    "adapters": ("a dict from names to folders, or names on the Hub", _is_adapters),
    "source_ranks": or_none("a dict from names of adapters to ranks of at least 1", _is_ranks),
    "shape": (f"one of {list(SHAPES)}", lambda value: value in SHAPES),
    "shared": FLAG,
    "omega_init": ("a finite number other than 0", lambda value: is_finite(value) and value != 0),
    "omega_dropout": ("a number from 0 to below 1", lambda value: is_finite(value) and 0 <= value < 1),
    "sources": or_none("a dict from modules to the ranks of their sources", _is_sources),
}


@dataclass
class ScaLearnConfig(LoraConfig):
    """Configuration of ScaLearn: finished adapters stay as they are, and how much each counts is learned.

        y = W0 x + sum_t omega_t (*) s_t B_t A_t x

    with s_t B_t A_t the update of source t, and omega_t one number for each output of the layer, or one number. Nothing
    else is trained, but what `modules_to_save`, `bias` and `trainable_token_indices` name. The sum is one LoRA of rank
    sum_t r_t (equation 2 of `functional.scales`), and so an adapter merges, exports and infers like that LoRA.

        config = ScaLearnConfig(adapters={"sql": "runs/sql", "chat": "runs/chat"}, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)

    The sources are read when the configuration is made, and are kept in the adapter's own checkpoint in float32. So a
    saved adapter needs no other folder; `adapters` then only says where they came from. A source counts in the modules
    that it has. What a source trained beside its factors is left out: heads silently, anything else with a warning.

    Of `LoraConfig`, these are made from the sources and must not be passed: `r`, `lora_alpha`, their patterns,
    `target_modules` and `target_parameters`. Work as in LoRA: `lora_dropout`, `bias`, `modules_to_save`,
    `trainable_token_indices`, `fan_in_fan_out`, `runtime_config`. Refused, each with its reason: what
    `peft_dynamic.methods.REFUSED` lists, `init_lora_weights`, and fields that a newer PEFT has.

    Args:
        adapters: name -> folder, or name on the Hub, of a LoRA adapter (rsLoRA, `rank_pattern`, `alpha_pattern` and
            `target_parameters` included), or a DyLoRA, MoSLoRA, ScaLearn or LoRETTA_rep one, the last with a
            `tensor_shape`. Never the target's own adapter, unless you put it there.
        source_ranks: name of a DyLoRA source -> the rank at which it is used; its r if it is not named.
        shape: "vector", omega_t in R^out; or "scalar", one number.
        shared: one omega for all layers, which with shape="vector" must have equally many outputs.
        omega_init: omega starts as N(omega_init / T, 0.001^2), T the number of sources.
        omega_dropout: in training, single entries of omega are dropped with this probability, for the whole batch. The
            authors have 0 for shape="scalar" with shared=True.
        sources: module -> source -> its rank there. Made from `adapters`, and written into the checkpoint.

    Raises:
        ValueError, TypeError: an argument has no meaning; the message names it, its value, the rule and the fix. Or a
            source is more than a product of two factors (DoRA, `lora_bias`), or they are of different base models.
        FileNotFoundError: a source is not there.

    Source: M. Frohmann, C. Holtermann, S. Masoudian, A. Lauscher, N. Rekabsaz: ScaLearn: Simple and Highly
    Parameter-Efficient Task Transfer by Learning to Scale, Findings of ACL 2024, arXiv 2310.01217; the authors' code
    CPJKU/ScaLearn. Other than there: the sources are LoRA adapters, which theirs skips, and the result folds.
    """

    adapters: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Name -> folder, or name on the Hub, of each source adapter."}
    )
    source_ranks: dict[str, int] | None = field(
        default=None, metadata={"help": "Name of a DyLoRA source -> the rank at which it is used; None for its r."}
    )
    shape: str = field(
        default="vector",
        metadata={"help": "'vector': a scale for each output of a layer. 'scalar': one number for a source."},
    )
    shared: bool = field(default=False, metadata={"help": "One omega for all layers."})
    omega_init: float = field(default=2.0, metadata={"help": "Omega starts near omega_init / number of sources."})
    omega_dropout: float = field(
        default=0.3, metadata={"help": "Probability with which an entry of omega is dropped in training."}
    )
    sources: dict[str, dict[str, int]] | None = field(
        default=None, metadata={"help": "Module -> source -> rank; made from adapters."}
    )

    def __post_init__(self) -> None:
        check_rules(self, RULES)
        check_refused(self, REFUSED_FIELDS)
        check_lora_fields(self)
        self._check_unset()
        # in the order of the names, as PEFT writes them: the rows of omega go by it
        self.adapters = {name: os.fspath(place) for name, place in sorted(self.adapters.items())}
        unknown = sorted({*(self.source_ranks or {})} - {*self.adapters})
        if unknown:
            raise ValueError(
                f"{self._name()}: source_ranks={self.source_ranks!r} names {unknown[0]!r}, which is none of the "
                f"adapters {[*self.adapters]}. Name those."
            )
        if self.sources is None:
            self._read()
        assert self.sources is not None
        self.sources = {module: dict(sorted(ranks.items())) for module, ranks in self.sources.items()}
        self._check_sources(self.sources)
        super().__post_init__()
        self.peft_type = PeftType.SCALEARN  # the member that hosts.registry adds

    def _name(self) -> str:
        return type(self).__name__

    def _check_unset(self) -> None:
        if self.init_lora_weights is not True:
            raise ValueError(
                f"{self._name()} does not support init_lora_weights={self.init_lora_weights!r}: the factors are those "
                "of the sources. Leave it out; omega_init is the start of what is trained."
            )
        if self.ensure_weight_tying:
            raise ValueError(
                f"{self._name()} does not support ensure_weight_tying=True: a file has the factors of tied layers "
                "twice. Leave it out."
            )
        if self.sources is not None:
            return
        if not self.adapters:
            raise ValueError(
                f"{self._name()}: adapters={self.adapters!r} is empty, and there is nothing to scale. Pass a dict from "
                "names to folders of finished adapters."
            )
        for each in fields(LoraConfig):
            value = getattr(self, each.name)
            if each.name in DERIVED and value != default_of(each):
                raise ValueError(
                    f"{self._name()}: {each.name}={value!r} is made from the sources, and must not be passed. Leave it "
                    "out; cut the sources with resize_adapter, or the result with merge(out, rank=...)."
                )

    def _check_sources(self, sources: dict[str, dict[str, int]]) -> None:
        strange = sorted({name for ranks in sources.values() for name in ranks} - {*self.adapters})
        if strange:
            raise ValueError(
                f"{self._name()}: sources names {strange[0]!r}, which is none of the adapters {[*self.adapters]}. "
                "Leave sources out: it is made from adapters. If the adapter was saved, take another copy."
            )

    def _read(self) -> None:
        """Take the sources in, with what follows from them."""
        # By name, as `methods` has its classes: reading files is a room above this one.
        stack = importlib.import_module("peft_dynamic.algebra.scales").stack_sources(
            self.adapters, self.source_ranks or {}
        )
        if self.shared and self.shape == "vector" and len({*stack.widths.values()}) > 1:
            found = {width: module for module, width in reversed(stack.widths.items())}
            shown = ", ".join(f"{width} in {module}" for width, module in sorted(found.items()))
            raise ValueError(
                f"{self._name()}: shape='vector' with shared=True has one omega for all layers, which then need "
                f"equally many outputs, and the sources have {shown}. Pass shape='scalar', shared=False, or sources "
                "with target_modules of one width."
            )
        for name in (*DERIVED, "fan_in_fan_out"):
            setattr(self, name, getattr(stack.config, name))
        self.sources = stack.sources
        self.keep_factors(stack.tensors)

    def keep_factors(self, factors: Mapping[str, Any]) -> None:
        """Have the sources' factors at hand, in the CPU's memory. No field: a checkpoint has them as tensors."""
        self._factors = {name: factor.cpu() for name, factor in factors.items()}

    @property
    def factors(self) -> dict[str, Any]:
        """Name in a checkpoint -> tensor, of the sources' factors; empty where only the configuration was loaded."""
        found: dict[str, Any] = self.__dict__.get("_factors", {})
        return found
