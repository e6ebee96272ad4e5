"""Configuration of MoSLoRA; the class docstring says what each field of PEFT's `LoraConfig` means here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from peft import LoraConfig
from peft.utils.peft_types import PeftType

from peft_dynamic.methods import METHODS
from peft_dynamic.rules import FLAG, Rule, check_rules, is_finite, is_int, or_none, plain
from peft_dynamic.tuners.lora_fields import check_init, check_lora_fields, check_ranks_of, check_refused
from peft_dynamic.tuners.mixer import SPECTRAL, ZERO, MixerConfig

REFUSED_FIELDS = METHODS["MOSLORA"].refused
_RULES: dict[str, Rule] = {
    "train_a": FLAG,
    "freeze_b": or_none("a number from 0 to 1", lambda value: is_finite(value) and 0 <= value <= 1),
    "total_steps": or_none("an int of at least 1", lambda value: is_int(value) and value >= 1),
}


@dataclass
class MoSLoRAConfig(MixerConfig, LoraConfig):
    """Configuration of MoSLoRA: `dW = lora_alpha / r * B M A`, with an r x r mixer M between LoRA's factors.

    M is folded into A wherever the update is computed, so an adapter merges, exports and infers like a LoRA of rank r;
    it has r * r more parameters per layer (per expert or group where the factors have several).

    Everything of `LoraConfig` keeps its meaning, `rank_pattern` (M has the module's rank), `use_rslora` and `use_dora`
    among it. Refused at construction, each with its reason: what `peft_dynamic.methods.REFUSED` lists, fields that a
    newer PEFT has, and `init_lora_weights` other than True, False, "gaussian" and "spectral".

    With the last four fields it is LaMDA, or LoRA-XS: see `lamda`. A is then never trained, and M is folded into B, so
    that a layer keeps r numbers of each token for the backward pass in place of its inputs.

    Args:
        mixer_init: "kaiming" (uniform in +-1 / sqrt(r), the authors' code), "orthogonal", "identity" (trained: starts
            as LoRA; the paper saw no gain over LoRA), or "butterfly" ([[I, I], [I, I]], the paper's two subspaces
            mixed; r must be even). "zero" goes with init_lora_weights="spectral" alone: with B = 0 too, no gradient
            would ever differ from 0.
        train_mixer: whether M is trained; None for yes, but for "butterfly", the paper's fixed pattern.
        init_lora_weights: as in LoRA, or "spectral": A and B are the leading r singular vectors of the layer's weight,
            of length 1. Linear layers only, quantised by bitsandbytes or not; needs mixer_init="zero".
        train_a: False leaves A as it starts. Linear layers only.
        freeze_b: the share of all optimizer steps after which all columns of B stand still, those of the largest
            singular values first: after i of N steps min(r, floor(r i / (freeze_b N))) of them. 0: B is never trained.
            None: it always is. Needs init_lora_weights="spectral" and train_a=False.
        total_steps: N. None where transformers' Trainer, or one of TRL's made of it, trains: it tells N itself.

    Raises:
        ValueError, TypeError: an argument has no meaning; the message names it, its value, the rule and the fix.

    Source: T. Wu, J. Wang, Z. Zhao, N. Wong: Mixture-of-Subspaces in Low-Rank Adaptation, EMNLP 2024, arXiv 2406.11909,
    section 3; the authors' code wutaiqiang/MoSLoRA, where M is the module `lora_AB`. LaMDA: S. Azizi, S. Kundu,
    M. Pedram, Findings of EMNLP 2024, arXiv 2406.12832. LoRA-XS: arXiv 2405.17604.
    """

    train_a: bool = field(default=True, metadata={"help": "False leaves A as it starts (LaMDA)."})
    freeze_b: float | None = field(
        default=None,
        metadata={"help": "Share of the training after which all of B stands still (LaMDA); 0 for never trained."},
    )
    total_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps of the whole training, for freeze_b; Trainer tells it itself."}
    )

    @classmethod
    def lamda(cls, r: int = 32, freeze_b: float = 0.3, **settings: Any) -> Self:
        """LaMDA: A and B from the weight's singular vectors, A frozen, B frozen bit by bit, M trained from 0.

        Args:
            r: rank; the paper has 64 for LLaMA-2-7B.
            freeze_b: eta of the paper; 0 for LoRA-XS, which trains M alone.
            settings: further fields.

        Source: Azizi, Kundu, Pedram, Findings of EMNLP 2024, arXiv 2406.12832.
        """
        spectral: dict[str, Any] = {"train_a": False, "init_lora_weights": SPECTRAL, "mixer_init": ZERO}
        return cls(r=r, freeze_b=freeze_b, **(spectral | settings))

    def __post_init__(self) -> None:
        check_refused(self, REFUSED_FIELDS)
        check_lora_fields(self)
        check_ranks_of(self)
        check_rules(self, _RULES)
        self.freeze_b, self.total_steps = plain(self.freeze_b), plain(self.total_steps)
        if self.init_lora_weights != SPECTRAL:
            check_init(self, "it sets B A, and the update is B M A", (SPECTRAL,))
        super().__post_init__()
        self.peft_type = PeftType.MOSLORA  # the member that hosts.registry adds
        self._check_mixer([self.r, *(self.rank_pattern or {}).values()])
        self._check_frozen()

    @property
    def freezes(self) -> bool:
        """Whether columns of B stand still from some step on."""
        return bool(self.freeze_b)

    def _check_frozen(self) -> None:
        """Raise for what goes with none of LaMDA's fields, or with some of them alone."""
        spectral = self.init_lora_weights == SPECTRAL
        if spectral and self.mixer_init != ZERO:
            self._refuse("init_lora_weights", f"mixer_init={self.mixer_init!r}", "would change the model at the start",
                         "Pass mixer_init='zero'")  # fmt: skip
        if spectral and self.train_mixer is False:
            self._refuse("train_mixer", "mixer_init='zero'", "is an update of 0 for good", "Leave train_mixer out")
        if self.freeze_b is not None and not (spectral and not self.train_a):
            missing = "train_a=True" if spectral else f"init_lora_weights={self.init_lora_weights!r}"
            self._refuse("freeze_b", missing, "is neither LaMDA nor LoRA-XS",
                         "Pass init_lora_weights='spectral', mixer_init='zero' and train_a=False")  # fmt: skip
        if self.total_steps is not None and not self.freezes:
            self._refuse("total_steps", f"freeze_b={self.freeze_b!r}", "has no meaning", "Leave total_steps out")
        if spectral or not self.train_a:
            given = "init_lora_weights" if spectral else "train_a"
            for name in ("use_dora", "target_parameters", "lora_bias"):
                if getattr(self, name):
                    self._refuse(given, f"{name}={getattr(self, name)!r}", "was not tried", f"Leave {name} out")

    def _refuse(self, name: str, other: str, why: str, fix: str) -> None:
        raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} with {other} {why}. {fix}.")
