"""The value function: a linear head on the policy's own last hidden state, or a model of its own.

Notable: the value function hangs below the policy, so that DDP and the optimizer see it, but keeps out of the policy's
state dict. What `save_pretrained` writes is the policy alone, with or without an adapter, and the value function has a
file of its own beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft_dynamic.hosts.offload import read_whole, write_whole

NAME = "ppo_value"  # of the child module
FILE = "value_head.safetensors"


class ValueFunction(nn.Module):
    """V(s) of states, from the policy's hidden states or, with `model`, from the tokens.

    Args:
        features: width of the policy's hidden states.
        device: where the head lives.
        model: a sequence-classification model with one label, for values of its own; or None.

    Raises:
        ValueError: the model's classifier does not give one number.
    """

    def __init__(self, features: int, device: torch.device, model: Any = None) -> None:
        super().__init__()
        self.model = model
        if model is None:
            # Float32 whatever the policy's dtype. At 0, a first rollout's advantages are its returns.
            self.head: nn.Module = nn.Linear(features, 1, device=device, dtype=torch.float32)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        else:
            classifier = _classifier(model)
            labels = getattr(classifier.config, "num_labels", None)
            if not isinstance(getattr(classifier, "score", None), nn.Module) or labels != 1:
                raise ValueError(
                    f"value_model is a {type(classifier).__name__} with {labels} labels, which gives no value per "
                    "token. Pass a sequence-classification model of a decoder: "
                    "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)."
                )
        self.register_load_state_dict_post_hook(_forget_missing)

    def forward(self, hidden: torch.Tensor, places: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Values at some places of the batch.

        Args:
            hidden: (places, features) the policy's hidden states there.
            places: (places,) index into the flattened (batch, tokens).
            **inputs: `input_ids` and `attention_mask`, for a model of its own.

        Returns:
            (places,) float32.
        """
        if self.model is None:
            with torch.autocast(hidden.device.type, enabled=False):
                return self.head(hidden.float())[:, 0]
        classifier = _classifier(self.model)
        own = classifier.base_model(**inputs, use_cache=False)[0].flatten(0, 1)[places]
        return classifier.score(own)[:, 0].float()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing: see the head of this file."""
        return kwargs.get("destination", {})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The whole parameters, to be saved; where an engine holds them in parts every process has to ask."""
        return {name: read_whole(p).cpu().contiguous() for name, p in self.named_parameters()}

    def save(self, folder: str | Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Write the parameters, or `tensors` of them, to a file in `folder`."""
        save_file(self.tensors() if tensors is None else tensors, Path(folder) / FILE)

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, or is of another value function.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {FILE}, so its value function is lost: it was not saved by PPOTrainer.")
        found = load_file(path)
        mine = dict(self.named_parameters())
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in mine.items()}  # the whole one's
        if shapes != {name: tuple(tensor.shape) for name, tensor in found.items()}:
            raise ValueError(
                f"{path} holds {sorted(found)[:3]}... of another value function than {sorted(mine)[:3]}...: pass the "
                "value_model (or none) that it was trained with."
            )
        for name, tensor in found.items():
            write_whole(mine[name], tensor)


def _classifier(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _forget_missing(module: nn.Module, incompatible: Any) -> None:
    """A policy's file has no value function in it, and that is right."""
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if NAME not in key.split(".")]
