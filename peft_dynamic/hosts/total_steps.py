"""How many optimizer steps there will be: transformers' Trainer knows, and tells what it trains."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def tell_total_steps() -> None:
    """Let each Trainer that is made from now on call `expect_steps` of what it trains, where a module has that.

    Through the list of callbacks that every Trainer begins with: nothing has to be passed to it.
    """
    from transformers import TrainerCallback, trainer

    class TotalSteps(TrainerCallback):
        """Tells modules of the model how many optimizer steps the training has."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for module in model.modules():
                if hasattr(module, "expect_steps"):
                    module.expect_steps(state.max_steps)

    trainer.DEFAULT_CALLBACKS.append(TotalSteps)
