"""What a forward pass of a DyLoRA model begins and ends with; `peft_dynamic.tuners.steps` has the optimizer's steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_dynamic.tuners.dylora.turns import turns_of
from peft_dynamic.tuners.steps import PassHooks


class RankedPassHooks(PassHooks):
    """Hooks that note each forward pass of the whole model, and whose turn it is."""

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a forward pass of the model."""
        if kwargs.get("ranks") is not None:  # many models take any name, and would run at the set rank
            raise TypeError(
                f"ranks={kwargs['ranks']!r}: it is an argument of a PeftModel, and {type(module).__name__} cannot take "
                "it. Make the PeftModel with get_peft_model or PeftModel.from_pretrained, and call that."
            )
        super().enter(module, args, kwargs)

    def begin(self, trains: bool) -> None:
        turns_of(self.schedule).enter_call(trains)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            turns_of(self.schedule).leave_call()
