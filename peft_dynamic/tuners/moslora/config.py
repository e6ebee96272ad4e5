"""Configuration of MoSLoRA; the class docstring says what each field of PEFT's `LoraConfig` means here."""

from dataclasses import dataclass

from peft import LoraConfig
from peft.utils.peft_types import PeftType

from peft_dynamic.methods import METHODS
from peft_dynamic.tuners.lora_fields import check_init, check_lora_fields, check_ranks_of, check_refused
from peft_dynamic.tuners.mixer import MixerConfig

REFUSED_FIELDS = METHODS["MOSLORA"].refused


@dataclass
class MoSLoRAConfig(MixerConfig, LoraConfig):
    """Configuration of MoSLoRA: `dW = lora_alpha / r * B M A`, with an r x r mixer M between LoRA's factors.

    M is folded into A wherever the update is computed, so an adapter merges, exports and infers like a LoRA of rank r;
    it has r * r more parameters per layer (per expert or group where the factors have several).

    Everything of `LoraConfig` keeps its meaning, `rank_pattern` (M has the module's rank), `use_rslora` and `use_dora`
    among it. Refused at construction, each with its reason: what `peft_dynamic.methods.REFUSED` lists, fields that a
    newer PEFT has, and `init_lora_weights` other than True, False and "gaussian".

    Args:
        mixer_init: "kaiming" (uniform in +-1 / sqrt(r), the authors' code), "orthogonal", "identity" (trained: starts
            as LoRA; the paper saw no gain over LoRA), or "butterfly" ([[I, I], [I, I]], the paper's two subspaces
            mixed; r must be even). Zero is refused: with B = 0 too, no gradient would ever differ from 0.
        train_mixer: whether M is trained; None for yes, but for "butterfly", the paper's fixed pattern.

    Raises:
        ValueError, TypeError: an argument has no meaning; the message names it, its value, the rule and the fix.

    Source: T. Wu, J. Wang, Z. Zhao, N. Wong: Mixture-of-Subspaces in Low-Rank Adaptation, EMNLP 2024, arXiv 2406.11909,
    section 3; the authors' code wutaiqiang/MoSLoRA, where M is the module `lora_AB`.
    """

    def __post_init__(self) -> None:
        check_refused(self, REFUSED_FIELDS)
        check_lora_fields(self)
        check_ranks_of(self)
        check_init(self, "it sets B A, and the update is B M A")
        super().__post_init__()
        self.peft_type = PeftType.MOSLORA  # the member that hosts.registry adds
        self._check_mixer([self.r, *(self.rank_pattern or {}).values()])
