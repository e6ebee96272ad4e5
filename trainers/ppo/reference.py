"""The reference policy: the adapter switched off, another adapter, a model of its own, or a frozen copy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from peft_dynamic.hosts.deepspeed import is_parted
from peft_dynamic.hosts.switch import depends_on_trained
from peft_dynamic.hosts.switch import switched as reference_policy  # noqa: F401  # its name before


def is_peft(model: Any) -> bool:
    """Whether the model is a PeftModel, without asking for its class by name."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that is not trained.

    Raises:
        ValueError: ZeRO-3 has loaded the model in parts.
    """
    if any(map(is_parted, model.parameters())):
        raise ValueError(
            "ref_model is None, and ZeRO-3 has loaded the model in parts, of which there is no copy for a reference "
            "policy. Train an adapter, pass ref_model, or set kl_coef=0."
        )
    return copy.deepcopy(model).requires_grad_(False).eval()


def check_reference(model: Any, adapter: str | None) -> None:
    """Raise unless the reference policy inside a PeftModel stays what it is while the adapter is trained.

    Asked of the adapter's configuration first, then tried: with every trained weight moved, the reference must give the
    same logits.

    Raises:
        ValueError: it does not, or `adapter` is none of the model's adapters or the one that is trained.
    """
    if adapter is not None and (adapter not in model.peft_config or adapter in model.active_adapters):
        raise ValueError(
            f"ref_adapter_name={adapter!r} must be an adapter of the model that is not trained: it has "
            f"{sorted(model.peft_config)} and trains {model.active_adapters}. Load one: "
            "model.load_adapter(path, name)."
        )
    for name in model.active_adapters:
        bias = getattr(model.peft_config[name], "bias", "none")
        if bias != "none":
            raise ValueError(
                f"{type(model.peft_config[name]).__name__}(bias={bias!r}) trains biases of the base model, which stay "
                "changed when the adapter is switched off: there is no reference policy left. Set bias='none', or "
                "pass ref_model."
            )
    ids = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    if depends_on_trained(model, adapter, lambda: model(input_ids=ids).logits):
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        raise ValueError(
            f"With the adapter switched off the model still depends on what is trained ({', '.join(names[:3])}, ...), "
            "so there is no reference policy in it. Train only the adapter's own weights, or pass ref_model."
        )
