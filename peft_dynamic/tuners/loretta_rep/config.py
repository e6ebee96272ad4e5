"""Configuration of LoRETTA_rep."""

from dataclasses import dataclass, field

from peft import LoraConfig
from peft.utils.peft_types import PeftType

from peft_dynamic.methods import METHODS
from peft_dynamic.rules import FLAG, check_rules, is_finite
from peft_dynamic.tuners.lora_fields import check_lora_fields, check_ranks_of, check_refused
from peft_dynamic.tuners.tensor_train_fields import check_tt_fields

REFUSED_FIELDS = METHODS["LORETTA_REP"].refused
INITS = ("True", "'noise_removal'", "'reference'")


@dataclass
class LorettaRepConfig(LoraConfig):
    """Configuration of LoRETTA_rep: LoRA whose two factors are the matrices of tensor trains.

        y = W0 x + lora_alpha / bottleneck * TT_B(TT_A(x))

    with TT_A: in -> bottleneck and TT_B: bottleneck -> out, both of rank `tensor_rank`. The factors are made from their
    cores in each training step, so an adapter merges, exports and infers like a LoRA of rank `bottleneck`. The layer
    norms are trained, and for sequence classification the dense layer in front of the last one is replaced by a tensor
    train and trained. The defaults give the published parameter counts, with `target_modules` naming query and value.

    Of `LoraConfig`, `r` is `bottleneck` and may be left out; `rank_pattern` gives a module a bottleneck of its own.
    Work as in LoRA: `lora_alpha` (16 here, the paper's), `alpha_pattern`, `lora_dropout`, `use_rslora`, `bias`,
    `lora_bias`, `fan_in_fan_out`, `modules_to_save`, `trainable_token_indices`, `exclude_modules`,
    `layers_to_transform`, `layers_pattern`, `layer_replication`, `ensure_weight_tying`, `runtime_config`.
    `target_modules` must be linear layers. Refused at construction, each with its reason: what
    `peft_dynamic.methods.REFUSED` lists, fields that a newer PEFT has, and `init_lora_weights`, for which there is
    `init_weights`.

    Args:
        bottleneck: width between the two tensor trains, LoRA's r.
        tensor_rank: rank between neighbouring cores.
        tensor_shape: k_1, ..., k_d with a product of features * bottleneck, for both trains of every target, which must
            then all have equally many inputs and outputs; None for an automatic shape, which is the reference's for the
            sizes that it has.
        train_layer_norms: train, save and load every layer norm of the model.
        tensorize_classifier: with task_type="SEQ_CLS", replace BERT's and DeBERTa's `pooler.dense`, RoBERTa's
            `classifier.dense` and their like by a new tensor train with a bias, of the same `tensor_rank`.
        init_weights: True: the last core of TT_B is 0, so the start is the base model, bit for bit; it gets a gradient
            at once, the other cores from the second step. "noise_removal", the paper's idea: all cores are random and
            the update of the start is taken away again, `TT_B(TT_A(x)) - TT_B0(TT_A0(x))` with frozen copies of the
            first cores, so it holds over quantised weights and merges exactly; the adapter then is a LoRA of rank
            2 * bottleneck, saves twice as many numbers, and starts at the base model up to rounding. "reference": all
            cores random and nothing taken away, as in the authors' code, which starts from a changed model.

    Raises:
        ValueError, TypeError: an argument has no meaning; the message names it, its value, the rule and the fix.

    Source: Y. Yang, J. Zhou, N. Wong, Z. Zhang: LoRETTA: Low-Rank Economic Tensor-Train Adaptation for
    Ultra-Low-Parameter Fine-Tuning of Large Language Models, NAACL 2024, arXiv 2402.11417, section 3.3; the authors'
    code yifanycc/loretta. Other than there: the start under init_weights=True, merging (theirs fails), and tensor
    shapes for every size.
    """

    r: int = field(default=0, metadata={"help": "The same as bottleneck; 0 to take it from there."})
    lora_alpha: int = field(default=16, metadata={"help": "The update is scaled by lora_alpha / bottleneck."})
    bottleneck: int = field(default=8, metadata={"help": "Width between the two tensor trains."})
    tensor_rank: int = field(default=5, metadata={"help": "Rank between neighbouring cores of a tensor train."})
    tensor_shape: list[int] | None = field(
        default=None,
        metadata={
            "help": "Factors of the tensor trains with a product of features * bottleneck; None for an automatic shape."
        },
    )
    train_layer_norms: bool = field(default=True, metadata={"help": "Train and save every layer norm of the model."})
    tensorize_classifier: bool = field(
        default=True,
        metadata={"help": "For SEQ_CLS, replace the dense layer in front of the last one by a trained tensor train."},
    )
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: the start is the base model. 'noise_removal': random cores less their first update. "
            "'reference': random, as the authors' code."
        },
    )

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_refused(self, REFUSED_FIELDS)
        if not is_finite(self.lora_alpha) or not self.lora_alpha > 0:
            raise ValueError(
                f"{name}: lora_alpha must be a finite number, got {self.lora_alpha!r}; it must be above 0."
            )
        check_lora_fields(self, skip=("r",))
        check_ranks_of(self)
        check_rules(self, {"train_layer_norms": FLAG, "tensorize_classifier": FLAG})
        check_tt_fields(self)
        if isinstance(self.r, bool) or self.r not in (0, self.bottleneck):
            raise ValueError(
                f"{name}: r={self.r!r} and bottleneck={self.bottleneck} mean the same and differ. Pass bottleneck "
                "alone."
            )
        self.r = self.bottleneck
        super().__post_init__()
        self.peft_type = PeftType.LORETTA_REP  # the member that hosts.registry adds
        if self.init_lora_weights is not True:
            raise ValueError(
                f"{name} does not support init_lora_weights={self.init_lora_weights!r}: the factors are tensor trains. "
                f"Pass init_weights, one of {', '.join(INITS)}."
            )
        if self.init_weights is not True and self.init_weights not in ("noise_removal", "reference"):
            raise ValueError(f"{name}: init_weights must be one of {', '.join(INITS)}, got {self.init_weights!r}.")
