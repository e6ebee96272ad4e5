"""Running, cutting and decoding a causal language model at a depth. Nothing here needs TRL."""

from peft_dynamic.exits.adaptive import generate_adaptive, paper_thresholds
from peft_dynamic.exits.calibrate import calibrate_thresholds
from peft_dynamic.exits.curve import ExitCurve, exit_curve
from peft_dynamic.exits.layers import exit_at, truncate_to_exit
from peft_dynamic.exits.speculative import assisted_exit, generate_speculative

__all__ = [
    "ExitCurve",
    "assisted_exit",
    "calibrate_thresholds",
    "exit_at",
    "exit_curve",
    "generate_adaptive",
    "generate_speculative",
    "paper_thresholds",
    "truncate_to_exit",
]
