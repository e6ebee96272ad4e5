"""Configuration of LoRA with a density loss."""

from dataclasses import dataclass, field

from peft import LoraConfig
from peft.utils.peft_types import PeftType

from peft_dynamic.density.settings import check_settings
from peft_dynamic.methods import METHODS
from peft_dynamic.rules import FLAG, check_rules
from peft_dynamic.tuners.lora_fields import check_lora_fields, check_ranks_of, check_refused

REFUSED_FIELDS = METHODS["DENSITY_LORA"].refused


@dataclass
class DensityLoRAConfig(LoraConfig):
    """A `LoraConfig` whose adapter brings an `ActivationDensityLoss` along while it is trained.

    The adapter itself is a LoRA in every respect: what it computes, how it is merged, saved and exported.

    Args:
        density_weight: factor of the density in the loss; 0 trains a plain LoRA and still measures it.
        density_eps: the square of the surrogate's width. 1e-7 in the authors' code.
        surrogate: "rational" (the authors' code), "tanh" or "hinge".
        activation_modules: None to find the feed-forward activations by structure; or the end of a module's name, a
            list of such ends, or a regular expression of whole names.
        density_layer_weights: a number per layer, or a dict from names or their ends to numbers; None for 1.
        include_padding: count padding too, as the authors' code does.

    Raises:
        ValueError, TypeError: an argument has no meaning; the message names it, its value, the rule and the fix.

    Source: B. Runwal, T. Pedapati, P.-Y. Chen: From PEFT to DEFT: Parameter Efficient Finetuning for Reducing
    Activation Density in Transformers, AAAI 2025, arXiv 2402.01911; the authors' code IBM/DEFT. Not the method that
    PEFT calls DEFT.
    """

    density_weight: float = field(default=1.0, metadata={"help": "Factor of the density in the loss; 0 for none."})
    density_eps: float = field(default=1e-7, metadata={"help": "The square of the surrogate's width."})
    surrogate: str = field(default="rational", metadata={"help": "'rational', 'tanh' or 'hinge'."})
    activation_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "None to find the feed-forward activations by structure, or ends of names, or a regular expression."
        },
    )
    density_layer_weights: list[float] | dict[str, float] | None = field(
        default=None, metadata={"help": "A weight per layer, or a dict from names to weights; None for 1."}
    )
    include_padding: bool = field(default=False, metadata={"help": "Count padding tokens too."})

    def __post_init__(self) -> None:
        check_refused(self, REFUSED_FIELDS)
        check_lora_fields(self)
        check_ranks_of(self)
        check_rules(self, {"include_padding": FLAG})
        super().__post_init__()
        self.peft_type = PeftType.DENSITY_LORA  # the member that hosts.registry adds
        check_settings(
            type(self).__name__,
            self.density_weight,
            self.density_eps,
            self.surrogate,
            self.activation_modules,
            self.density_layer_weights,
            prefix="density_",
        )
        if isinstance(self.activation_modules, set | tuple):
            self.activation_modules = sorted(self.activation_modules)
