"""Configuration of DyLoRA; the class docstring says what each field of PEFT's `LoraConfig` means here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from peft import LoraConfig
from peft.utils.peft_types import PeftType

from peft_dynamic.functional.ranks import SCALING_RULES
from peft_dynamic.hosts.saving import after_saving
from peft_dynamic.methods import METHODS
from peft_dynamic.rules import FLAG, check_rules, is_finite, is_int, is_number, plain
from peft_dynamic.tuners.lora_fields import check_init, check_lora_fields, check_refused
from peft_dynamic.tuners.mixer import MixerConfig

REFUSED_FIELDS = METHODS["DYLORA"].refused


@dataclass
class DyLoRAConfig(MixerConfig, LoraConfig):
    """Configuration of DyLoRA: train one LoRA adapter, use it at any rank.

    An optimizer step has one rank b, the largest unless `rank_sampling` draws lower ones, and its forward pass uses an
    update of rank b made from the whole matrices B (out, r) and A (r, in). Outside training the rank chosen by
    `set_rank` is used, r at first. The defaults are what we measured best (benchmarks/any_rank);
    `DyLoRAConfig.paper(...)` gives the paper's rules, eq. 7: `alpha / b * B[:, :b] @ A[:b]` with every rank equally
    likely.

    Everything of `LoraConfig` keeps its meaning, with these exceptions.
    Changed: `r` is the largest rank; `rank_pattern` caps a module's rank (a module capped at 4 runs at min(b, 4));
    for fused projections of experts PEFT writes a multiple k r into it, and they run at k b; `lora_alpha` and
    `alpha_pattern` are the alpha that `scaling` turns into a scale. Trained at every step whatever the rank, because
    they have no rank: `bias`, `lora_bias`, `modules_to_save`, `trainable_token_indices`.
    Work as in LoRA: `target_modules`, `exclude_modules`, `target_parameters`, `lora_dropout`, `fan_in_fan_out`,
    `layers_to_transform`, `layers_pattern`, `layer_replication`, `ensure_weight_tying`, `runtime_config`,
    `init_lora_weights` True, False (a random B: not the base model at the start, as in LoRA) or "gaussian".
    Refused at construction, each with its reason: what `peft_dynamic.methods.REFUSED` lists, fields that a newer PEFT
    has, and other `init_lora_weights` ("orthogonal", "pissa", "olora", "eva", "corda", "loftq", "mica", ...).

        config = DyLoRAConfig(r=8, ranks=[1, 2, 4, 8], target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)

    Args:
        r: the largest rank, and the rank of the stored matrices.
        ranks: increasing list of the ranks to train, its largest equal to `r`; None for every integer 1..r.
        truncation: what rank b keeps of the whole update. "svd": its b leading singular components, so that every rank
            is the best approximation of the full one; E and F of `functional.ranks.leading_components` give the cut
            factors `F[:b] A` and `B E[:, :b]`, made anew whenever A and B have changed, and gradients flow through them
            to all of A and B. "prefix": the first b rows of A and columns of B, the paper's.
        rank_sampling: "full" (r at every step, as LoRA: the lower ranks are cuts of it; with truncation="svd" only);
            "mostly_full" (r with probability 3/4, the other ranks equally); "uniform"; "geometric" (the
            i-th rank of the list with probability proportional to `geometric_p * (1 - geometric_p) ** i`); or one
            weight per rank. None for "full", and for "mostly_full" under truncation="prefix".
        geometric_p: p of the geometric distribution; 0.15 in the paper.
        update: "nested" trains everything that the drawn rank b uses. "frozen", with truncation="prefix" only, is the
            paper's FROZEN: components up to the next smaller rank of the list take part in the forward pass but get no
            gradient, so only row/column b (with gaps in `ranks`: the block that b adds) is trained. A zero gradient
            alone does not keep a component still, since AdamW's momentum and weight decay go on moving it; under
            "frozen" every other component is therefore put back after each optimizer step, so that only row/column b
            moves. Its moments still decay as with a zero gradient. Under "nested" nothing is put back: with
            truncation="prefix" the components above b have a zero gradient and move by the optimizer's momentum and
            weight decay alone, as in the authors' code.
        scaling: the scale of rank b: "alpha/r" (the same for all), "alpha/b" (the paper's), "alpha/sqrt(b)" or
            "alpha/sqrt(r*b)".
        use_mixer: put MoSLoRA's trained r x r mixer M between the factors: the update is made of B M A instead of B A.
            Ours, in neither paper: with truncation="prefix" rank b has `B[:, :b] @ M[:b, :b] @ A[:b]`, with "svd" the b
            leading singular components of B M A.
        mixer_init: start of M; see `MoSLoRAConfig`. Of no meaning without `use_mixer`, as is `train_mixer`.
        train_mixer: whether M is trained; None for yes, but for "butterfly".
        rank_seed: seed of the rank draws. The rank of step t depends on this seed and t alone: not on torch's or
            python's generators, the process, or how often the step is retried.

        hub_ranks: ranks of which `save_pretrained` also writes stock LoRAs, into folders `rank-4` and so on beside the
            adapter. So `model.push_to_hub` and `trainer.push_to_hub` carry them: a push cannot be told from a save, and
            an ordinary save is not to grow. None for none; `push_adapter` makes them by itself.

    Raises:
        ValueError, TypeError: an argument has no meaning; the message names it, its value, the rule and the fix.

    Source: M. Valipour, M. Rezagholizadeh, I. Kobyzev, A. Ghodsi: DyLoRA: Parameter-Efficient Tuning of Pre-trained
    Models using Dynamic Search-Free Low-Rank Adaptation, EACL 2023, arXiv 2210.07558, section 4 and algorithm 1.
    Beyond the paper: truncation="svd", "mostly_full", explicit `ranks`, weights per rank, scales other than "alpha/b".
    """

    ranks: list[int] | None = field(
        default=None,
        metadata={
            "help": "Increasing list of the ranks to train, its largest equal to r; None for every integer 1..r."
        },
    )
    truncation: str = field(
        default="svd",
        metadata={
            "help": "What rank b keeps of the update: 'svd', its leading singular components, or 'prefix', the paper's "
            "first rows and columns."
        },
    )
    rank_sampling: str | list[float] | None = field(
        default=None,
        metadata={
            "help": "How a step's rank is drawn: 'full', 'mostly_full', 'uniform', 'geometric', or a weight per rank. "
            "None for 'full', and for 'mostly_full' under truncation='prefix'."
        },
    )
    geometric_p: float = field(
        default=0.15, metadata={"help": "p of rank_sampling='geometric', between 0 and 1. The paper's is 0.15."}
    )
    update: str = field(
        default="nested",
        metadata={"help": "'nested' trains all that the drawn rank uses, 'frozen' only its last row and column."},
    )
    scaling: str = field(
        default="alpha/r",
        metadata={"help": "Scale at rank b: 'alpha/r', 'alpha/b' (the paper's), 'alpha/sqrt(b)' or 'alpha/sqrt(r*b)'."},
    )
    use_mixer: bool = field(default=False, metadata={"help": "Put MoSLoRA's r x r mixer between the factors."})
    rank_seed: int = field(default=0, metadata={"help": "Seed of the rank draws; the same on every process."})
    hub_ranks: list[int] | None = field(
        default=None,
        metadata={"help": "Ranks of which every save also writes a stock LoRA, so that push_to_hub carries them."},
    )

    def __post_init__(self) -> None:
        check_refused(self, REFUSED_FIELDS)
        check_lora_fields(self)
        check_rules(self, {"use_mixer": FLAG})
        # The others subtract the full-rank product from the base weights or need it to vanish as a whole.
        check_init(self, "that start is the base model at the full rank only, and DyLoRA trains every rank")
        super().__post_init__()
        self.peft_type = PeftType.DYLORA  # the member that hosts.registry adds
        self._check_ranks()
        self._check_sampling()
        if self.use_mixer:
            self._check_mixer([*self.trained_ranks, *(self.rank_pattern or {}).values()])
            if self.update == "frozen":
                raise ValueError(
                    f"{self._name()}: update='frozen' trains single rows and columns, which use_mixer=True mixes. Pass "
                    "update='nested', or use_mixer=False."
                )

    @classmethod
    def paper(cls, **kwargs: Any) -> Self:
        """The paper's rules: truncation="prefix", scaling="alpha/b", rank_sampling="uniform"; `kwargs` as usual."""
        return cls(**{"truncation": "prefix", "scaling": "alpha/b", "rank_sampling": "uniform", **kwargs})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's; and with `hub_ranks` the stock LoRAs beside an adapter whose tensors are there."""
        super().save_pretrained(save_directory, **kwargs)
        if self.hub_ranks:
            for step in after_saving:
                step(self, Path(save_directory))

    @property
    def trained_ranks(self) -> tuple[int, ...]:
        """The ranks that training draws from, increasing."""
        return tuple(self.ranks) if self.ranks is not None else tuple(range(1, self.r + 1))

    def _name(self) -> str:
        return type(self).__name__

    def _check_ranks(self) -> None:
        name = self._name()
        if self.ranks is not None:
            if isinstance(self.ranks, str) or not isinstance(self.ranks, Sequence) or not all(map(is_int, self.ranks)):
                raise TypeError(f"{name}: ranks must be a list of ints or None, got {self.ranks!r}.")
            self.ranks = [int(rank) for rank in self.ranks]
            increasing = all(a < b for a, b in zip(self.ranks, self.ranks[1:], strict=False))
            if not self.ranks or self.ranks[0] < 1 or not increasing:
                raise ValueError(
                    f"{name}: ranks must be strictly increasing and start at 1 or above, got {self.ranks!r}. "
                    "Sort the list and drop duplicates, or pass None for every integer 1..r."
                )
            if self.ranks[-1] != self.r:
                raise ValueError(
                    f"{name}: the largest of ranks must equal r, got ranks={self.ranks!r} and r={self.r}. "
                    f"Pass r={self.ranks[-1]}, or end the list with {self.r}."
                )
        for pattern, rank in (self.rank_pattern or {}).items():
            if not is_int(rank) or (not 1 <= rank <= self.r and not self._is_fused(pattern, rank)):
                raise ValueError(
                    f"{name}: rank_pattern caps a module's rank, so each value must lie in 1..r={self.r}; "
                    f"got {rank!r} for {pattern!r}. Lower it, or raise r."
                )

        if self.hub_ranks is not None:
            listed = self.hub_ranks
            if isinstance(listed, str) or not isinstance(listed, Sequence) or not all(map(is_int, listed)):
                raise TypeError(f"{name}: hub_ranks must be a list of ints or None, got {listed!r}.")
            if not all(1 <= rank <= self.r for rank in listed):
                raise ValueError(
                    f"{name}: hub_ranks must lie in 1..r={self.r}, got {listed!r}. Lower them, or raise r."
                )
            self.hub_ranks = [int(rank) for rank in listed]

    def _is_fused(self, pattern: str, rank: int) -> bool:
        """Whether PEFT wrote this entry, for two projections of experts that are one of `target_parameters`."""
        written = {rf".*\.{re.escape(parameter)}" for parameter in self.target_parameters or ()}
        return pattern in written and rank > self.r and rank % self.r == 0

    def _check_sampling(self) -> None:
        name, ranks = self._name(), self.trained_ranks
        if self.rank_sampling is None:  # written down, so that a saved adapter says what it was trained with
            self.rank_sampling = "mostly_full" if self.truncation == "prefix" else "full"
        if isinstance(self.rank_sampling, str):
            if self.rank_sampling not in ("full", "mostly_full", "uniform", "geometric"):
                raise ValueError(
                    f"{name}: rank_sampling must be 'mostly_full', 'full', 'uniform', 'geometric' or one weight "
                    f"per rank, got {self.rank_sampling!r}."
                )
            if self.rank_sampling == "full" and self.truncation == "prefix":
                raise ValueError(
                    f"{name}: rank_sampling='full' trains r alone, and truncation='prefix' cuts to components "
                    "that are in no order then. Pass truncation='svd', or another rank_sampling."
                )
        else:
            if not isinstance(self.rank_sampling, Sequence):
                raise TypeError(
                    f"{name}: rank_sampling must be a name or a list with one weight per rank, "
                    f"got {self.rank_sampling!r}."
                )
            weights: list[Any] = list(self.rank_sampling)
            if not all(map(is_number, weights)) or len(weights) != len(ranks):
                raise ValueError(
                    f"{name}: rank_sampling as a list needs one number per rank, got {weights!r} "
                    f"for the {len(ranks)} ranks {list(ranks)}."
                )
            if not all(is_finite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
                raise ValueError(
                    f"{name}: the weights of rank_sampling must be finite, at least 0 and not all 0, got {weights!r}."
                )
            self.rank_sampling = [float(weight) for weight in weights]
        if not is_finite(self.geometric_p) or not 0 < self.geometric_p < 1:
            raise ValueError(f"{name}: geometric_p must be a number between 0 and 1, got {self.geometric_p!r}.")
        if self.update not in ("nested", "frozen"):
            raise ValueError(f"{name}: update must be 'nested' or 'frozen', got {self.update!r}.")
        if self.truncation not in ("svd", "prefix"):
            raise ValueError(f"{name}: truncation must be 'svd' or 'prefix', got {self.truncation!r}.")
        if self.update == "frozen" and self.truncation != "prefix":
            raise ValueError(
                f"{name}: update='frozen' trains single rows and columns, which truncation={self.truncation!r} mixes. "
                "Pass truncation='prefix', or update='nested'."
            )
        if not isinstance(self.scaling, str) or self.scaling not in SCALING_RULES:
            raise ValueError(f"{name}: scaling must be one of {list(SCALING_RULES)}, got {self.scaling!r}.")
        if not is_int(self.rank_seed):
            raise TypeError(f"{name}: rank_seed must be an int, got {self.rank_seed!r}.")
        self.rank_seed, self.geometric_p = plain(self.rank_seed), plain(self.geometric_p)
