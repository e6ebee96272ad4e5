"""Which rank a training step uses: drawn once per optimizer step, the same everywhere, continued after a resume.

Notable: the draw happens at an optimizer's step (`peft_dynamic.tuners.steps`), not in a forward pass: a forward pass
may be repeated (gradient checkpointing, accumulation) or compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from peft_dynamic.functional.ranks import draw_rank, rank_weights
from peft_dynamic.tuners.dylora.config import DyLoRAConfig
from peft_dynamic.tuners.dylora.turns import turns_of
from peft_dynamic.tuners.steps import StepSchedule


class RankSchedule(StepSchedule):
    """The rank draws of one adapter, shared by all its layers.

    Attributes:
        drawn: the rank of the current training step.
    """

    method, field, instead = "DyLoRA", "update='frozen'", "use update='nested'"
    optional_buffers = ("moments", "moments_step", "moments_of")
    moments: torch.Tensor | None
    moments_step: torch.Tensor | None
    moments_of: torch.Tensor | None

    def __init__(self, config: DyLoRAConfig) -> None:
        super().__init__()
        self.ranks = config.trained_ranks
        self.weights = rank_weights(self.ranks, config.rank_sampling or "full", config.geometric_p)
        self.seed = config.rank_seed
        self.update = config.update
        self.cuts_alone = config.rank_sampling == "full"  # no rank below the largest is trained more than another
        self.warned: set[int] = set()
        self.keep_moments(None)
        self.arrive()

    @property
    def holds_still(self) -> bool:  # type: ignore[override]  # a class attribute of the base
        return self.update == "frozen"

    @property
    def unmoved(self) -> str:
        return f"it still trains its first rank, {self.drawn}"

    def arrive(self) -> None:
        """Draw the rank of the step that comes next."""
        self.drawn = draw_rank(self.ranks, self.weights, self.seed, self._steps)

    # --- what a calibration measured

    def keep_moments(
        self, grams: Sequence[tuple[torch.Tensor, torch.Tensor]] | None, names: Sequence[str] = ()
    ) -> None:
        """Cut by these from now on, until the factors are trained further; None for the plain cut.

        Kept as one float32 buffer, so that it travels with the checkpoint as the step number does. Beside it are the
        layers' names, one a line in UTF-8: a checkpoint alone does not say in which order a model has its layers.

        Args:
            grams: K_A and K_B, (n, r, r) each, of each layer in the order of their making.
            names: of these layers.
        """
        flat = [] if grams is None else [gram.flatten().float().cpu() for pair in grams for gram in pair]
        self.register_buffer("moments", torch.cat(flat) if flat else None)
        self.register_buffer("moments_step", self.step.clone() if flat else None)
        written = torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8) if flat and names else None
        self.register_buffer("moments_of", written)

    def current_moments(self) -> torch.Tensor | None:
        """Those of `keep_moments`, unless an optimizer has stepped since: then they are of other factors."""
        if self.moments is None or self.moments_step is None:
            return None
        self.refresh()
        if int(self.moments_step) != self._steps:
            self.keep_moments(None)
            warnings.warn(
                "the adapter has been trained since it was calibrated: its ranks are cut by their weights alone again. "
                "Call calibrate again.",
                stacklevel=2,
            )
            return None
        return self.moments

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.optional_buffers:
            found = state_dict.get(prefix + name)
            if found is not None or prefix + "step" in state_dict:  # every module is asked, whatever is loaded
                self.register_buffer(name, None if found is None else torch.zeros_like(found, device="cpu"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:  # .half() would lose what a decomposition needs
        kept = self.moments
        super()._apply(fn, *args, **kwargs)
        if kept is not None and self.moments is not None and self.moments.dtype != kept.dtype:
            self.moments = kept.to(self.moments.device)
        return self

    @property
    def suspended(self) -> bool:
        """Whether the model runs without gradients (generation in train mode): nothing is sampled then."""
        # Not asked of the layer: reentrant checkpointing runs the layers of a training step without gradients.
        return not torch.is_grad_enabled() if torch.compiler.is_compiling() else turns_of(self).without_gradients()

    def below(self, rank: int) -> int:
        """The next smaller trained rank, 0 below the smallest."""
        below = 0
        for trained in self.ranks:
            if trained < rank:
                below = trained
        return below


def warn_if_untrained(schedule: RankSchedule, rank: int) -> None:
    """Warn once where a rank is to be used that the training never draws."""
    if rank in schedule.ranks or rank in schedule.warned or schedule.cuts_alone or not rank:
        return
    schedule.warned.add(rank)
    warnings.warn(
        f"rank {rank} is not one of the trained ranks {list(schedule.ranks)}: it works, but was not trained.",
        stacklevel=4,
    )
