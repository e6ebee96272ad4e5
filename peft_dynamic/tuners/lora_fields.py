"""Which of `LoraConfig`'s fields a method of ours cannot honour: refused at construction, by name."""

from typing import Any

# init_lora_weights values whose start leaves the base weights alone and does not count on the product B A.
ALLOWED_INITS = (True, False, "gaussian")


def check_refused(config: Any, refused: dict[str, str]) -> None:
    """Raise ValueError for a field in `refused` (name to reason) that is set."""
    for name, reason in refused.items():
        if getattr(config, name, None):
            raise ValueError(f"{type(config).__name__} does not support {name}={getattr(config, name)!r}: {reason}.")


def check_init(config: Any, reason: str) -> None:
    """Raise ValueError for an `init_lora_weights` that sets more than a start for A and B."""
    value = config.init_lora_weights
    if not any(value is allowed or value == allowed for allowed in ALLOWED_INITS):
        raise ValueError(
            f"{type(config).__name__} does not support init_lora_weights={value!r}: {reason}. Pass True, False or "
            "'gaussian'."
        )
