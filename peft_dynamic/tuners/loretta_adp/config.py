"""Configuration of LoRETTA_adp."""

from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils.peft_types import PeftType
from transformers.activations import ACT2FN

from peft_dynamic.rules import FLAG, check_rules, is_finite, plain
from peft_dynamic.tuners.lora_fields import COMMON, INDICES, LISTED, NAMES, check_known
from peft_dynamic.tuners.tensor_train_fields import check_tt_fields

PLACEMENTS = ("paper", "reference")
RULES = COMMON | {
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "train_layer_norms": FLAG,
    "tensorize_classifier": FLAG,
    "modules_to_save": LISTED,
    "layers_to_transform": INDICES,
    "layers_pattern": NAMES,
}


# Activations of transformers with parameters of their own, which an adapter would have to train and save.
_TRAINED_ACTIVATIONS = {"prelu", "xielu"}


def non_linearities() -> tuple[str, ...]:
    """Names of transformers' activation functions that hold no parameters of their own."""
    return tuple(sorted(set(ACT2FN) - _TRAINED_ACTIVATIONS))


@dataclass
class LorettaAdpConfig(PeftConfig):
    """Configuration of LoRETTA_adp: bottleneck adapters whose two matrices are tensor trains.

    An adapter follows each attention output projection and each feed-forward output projection:

        y = h + scaling * up(act(down(dropout(h))))

    with down: hidden -> bottleneck and up: bottleneck -> hidden, each a tensor train of rank `tensor_rank` with a bias.
    The layer norms are trained, and for sequence classification the dense layer in front of the last one is replaced
    by a tensor train and trained. The defaults give the published parameter counts.

    Args:
        bottleneck: width between down and up.
        tensor_rank: rank between neighbouring cores. 5 for BERT-sized models, 8 for LLaMA in the authors' scripts.
        tensor_shape: k_1, ..., k_d with a product of hidden * bottleneck, for down and up alike; None for an automatic
            shape, which is the reference's for the sizes that it has.
        non_linearity: a name of transformers' `ACT2FN` whose function has no parameters. The authors' scripts use
            "relu".
        scaling: factor of the adapter's output.
        dropout: probability, on the adapter's input.
        placement: "paper" as above. "reference" as the authors' code does it: the same on encoder models; elsewhere an
            adapter on the input of each linear layer that opens the feed-forward block (LLaMA's gate_proj and up_proj,
            OPT's fc1) and one on the output of the block (down_proj, fc2), and none at the attention.
        target_modules: None to find the layers by the model's structure; or what PEFT takes (a list of names or their
            ends, a regular expression, "all-linear") for an adapter after each of these linear layers.
        exclude_modules: a list of names or a regular expression of modules that get no adapter.
        train_layer_norms: train, save and load every layer norm of the model.
        tensorize_classifier: with task_type="SEQ_CLS", replace BERT's and DeBERTa's `pooler.dense`, RoBERTa's
            `classifier.dense` and their like by a new tensor train with a bias, of the same `tensor_rank`. Models
            without such a layer (LLaMA's `score`) have nothing to replace.
        modules_to_save: further modules to train and save whole.
        layers_to_transform: an index or a list of indices of the transformer blocks that get adapters.
        layers_pattern: name of the list of blocks, with `layers_to_transform`.
        init_weights: True: up gives exactly 0, so that the start is the model without adapters; its last core gets a
            gradient at once, the other cores from the second step. "reference": all cores random and biases uniform in
            +-1 / sqrt(out), as in the authors' code, which starts from a changed model.

    Raises:
        ValueError, TypeError: an argument has no meaning; the message names it, its value, the rule and the fix.

    Source: Y. Yang, J. Zhou, N. Wong, Z. Zhang: LoRETTA: Low-Rank Economic Tensor-Train Adaptation for
    Ultra-Low-Parameter Fine-Tuning of Large Language Models, NAACL 2024, arXiv 2402.11417; the authors' code
    yifanycc/loretta. Other than there: the start under init_weights=True, the layer norms are really trained (their
    adp code leaves them frozen by mistake), and tensor shapes for every size.
    """

    bottleneck: int = field(default=64, metadata={"help": "Width of the adapters between down and up."})
    tensor_rank: int = field(default=5, metadata={"help": "Rank between neighbouring cores of a tensor train."})
    tensor_shape: list[int] | None = field(
        default=None,
        metadata={
            "help": "Factors of the tensor trains with a product of hidden * bottleneck; None for an automatic shape."
        },
    )
    non_linearity: str = field(
        default="relu", metadata={"help": "Activation between down and up: a name of transformers' ACT2FN."}
    )
    scaling: float = field(default=1.0, metadata={"help": "Factor of the adapter's output."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the adapter's input."})
    placement: str = field(
        default="paper",
        metadata={
            "help": "'paper': after each attention and each feed-forward output projection. 'reference': as the "
            "authors' code, which differs on decoders."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "None to find the layers by structure, or names, a regular expression or 'all-linear' for an "
            "adapter after each of these linear layers."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules that get no adapter."}
    )
    train_layer_norms: bool = field(default=True, metadata={"help": "Train and save every layer norm of the model."})
    tensorize_classifier: bool = field(
        default=True,
        metadata={"help": "For SEQ_CLS, replace the dense layer in front of the last one by a trained tensor train."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the transformer blocks that get adapters; None for all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks that layers_to_transform counts in."}
    )
    init_weights: bool | str = field(
        default=True,
        metadata={"help": "True: the start is the model without adapters. 'reference': random, as the authors' code."},
    )

    def __post_init__(self) -> None:
        check_rules(self, RULES)
        check_known(self, PeftConfig, RULES)
        super().__post_init__()
        self.peft_type = PeftType.LORETTA_ADP  # the member that hosts.registry adds
        self._check_numbers()
        self._check_choices()
        self._check_targets()

    def _check_numbers(self) -> None:
        check_tt_fields(self)
        if not is_finite(self.scaling):
            raise ValueError(f"LorettaAdpConfig: scaling must be a finite number, got {self.scaling!r}.")
        if not is_finite(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"LorettaAdpConfig: dropout must be a number from 0 to below 1, got {self.dropout!r}.")
        self.scaling, self.dropout = plain(self.scaling), plain(self.dropout)

    def _check_choices(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"LorettaAdpConfig: placement must be one of {PLACEMENTS}, got {self.placement!r}.")
        if not isinstance(self.non_linearity, str) or self.non_linearity not in non_linearities():
            raise ValueError(
                "LorettaAdpConfig: non_linearity must name an activation of transformers that has no parameters, one "
                f"of {', '.join(non_linearities())}; got {self.non_linearity!r}."
            )
        if self.init_weights is not True and self.init_weights != "reference":
            raise ValueError(
                f"LorettaAdpConfig: init_weights must be True or 'reference', got {self.init_weights!r}. For a random "
                "start as in the authors' code pass 'reference'."
            )

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                continue
            if not value and name == "target_modules":
                raise ValueError(
                    "LorettaAdpConfig: target_modules is empty. Pass None to find the layers by structure."
                )
            setattr(self, name, set(value))
        if self.target_modules is not None and self.placement != "paper":
            raise ValueError(
                f"LorettaAdpConfig: placement={self.placement!r} finds the layers by structure, and target_modules="
                f"{self.target_modules!r} names them. Leave one of the two at its default."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "LorettaAdpConfig: layers_to_transform has no effect with a regular expression as target_modules, got "
                f"{self.target_modules!r}. Put the indices into the expression, or pass a list of names."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"LorettaAdpConfig: layers_pattern={self.layers_pattern!r} needs layers_to_transform, the indices to "
                "take. Pass both or neither."
            )
