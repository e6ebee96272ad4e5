"""Configuration of QDyLoRA: DyLoRA on a quantised base."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils.peft_types import PeftType

from peft_dynamic.functional.ranks import usual_ranks
from peft_dynamic.tuners.dylora.config import DyLoRAConfig


@dataclass
class QDyLoRAConfig(DyLoRAConfig):
    """Configuration of QDyLoRA: DyLoRA over a base model with quantised weights.

    Args:
        r: the largest rank; 64 by default.
        ranks: the ranks to train; None for the powers of two up to `r` (1, 2, 4, ..., 64: the paper's pre-defined
            list) with `r` itself at the end.
        lora_alpha: 16 by default, QLoRA's.

    All else is as in `DyLoRAConfig`. An unquantised base model is refused; `QDyLoRAConfig.quantization_config()` makes
    the matching `BitsAndBytesConfig`.

    Source: H. Rajabzadeh et al.: QDyLoRA: Quantized Dynamic Low-Rank Adaptation for Efficient Large Language Model
    Tuning, EMNLP 2024 industry track, arXiv 2402.10462.
    """

    r: int = field(default=64, metadata={"help": "The largest rank."})
    lora_alpha: int = field(default=16, metadata={"help": "Lora alpha."})

    def __post_init__(self) -> None:
        if self.ranks is None and isinstance(self.r, int) and self.r >= 1:
            self.ranks = usual_ranks(self.r)
        super().__post_init__()
        self.peft_type = PeftType.QDYLORA  # the member that hosts.registry adds

    @staticmethod
    def quantization_config(bits: int = 4, compute_dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Any:
        """The `transformers.BitsAndBytesConfig` for the base model.

        Args:
            bits: 4 (NF4 with double quantisation, the paper's) or 8 (LLM.int8).
            compute_dtype: dtype of the matrix products under 4 bits; torch.float16 on GPUs without bfloat16.
            kwargs: passed on to `BitsAndBytesConfig`, over the values chosen here.

        Raises:
            ValueError: `bits` is neither 4 nor 8.
        """
        from transformers import BitsAndBytesConfig

        if bits == 8:
            return BitsAndBytesConfig(**{"load_in_8bit": True, **kwargs})
        if bits != 4:
            raise ValueError(f"QDyLoRAConfig.quantization_config: bits must be 4 or 8, got {bits!r}.")
        chosen = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute_dtype,
        }
        return BitsAndBytesConfig(**{**chosen, **kwargs})
