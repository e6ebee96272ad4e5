"""The bases of truncation="svd", for all layers at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from peft_dynamic.functional.ranks import bases_of

if TYPE_CHECKING:
    from peft_dynamic.tuners.dylora.layer import AdapterRanks


def prepare(many: Iterable[tuple[AdapterRanks, int]]) -> None:
    """Each layer's rank comes next: make the bases for it that are out of date, which a compiled pass could not."""
    find_bases(ranks for ranks, rank in many if ranks.wants_basis(rank) and ranks.is_out_of_date())


@torch.compiler.disable
def find_bases(many: Iterable[AdapterRanks]) -> None:
    """The bases of all these layers, those of equal r in one batch: a step has one eigenproblem, not one per layer."""
    # Ordinary tensors even from an evaluation under inference_mode: training may use them next.
    with torch.inference_mode(False), torch.no_grad():
        alike: dict[Any, list[tuple[AdapterRanks, torch.Tensor, torch.Tensor]]] = {}
        for ranks in many:
            gram_a, gram_b = ranks.grams()
            _check_finite(ranks, gram_a, gram_b)
            alike.setdefault((gram_a.shape[-1], gram_a.device), []).append((ranks, gram_a, gram_b))
        for group in alike.values():
            sizes = [len(gram_a) for _, gram_a, _ in group]
            e, f = bases_of(
                torch.cat([gram_a for _, gram_a, _ in group]), torch.cat([gram_b for _, _, gram_b in group])
            )
            for (ranks, _, _), e_part, f_part in zip(group, e.split(sizes), f.split(sizes), strict=True):
                ranks.keep_basis(e_part, f_part)


def _check_finite(ranks: AdapterRanks, gram_a: torch.Tensor, gram_b: torch.Tensor) -> None:
    for name, gram in (("lora_A", gram_a), ("lora_B", gram_b)):
        if not gram.isfinite().all():
            what = "NaN" if gram.isnan().any() else "infinite values"
            raise RuntimeError(
                f"DyLoRA: {name} of {ranks.name or 'a layer'} holds {what} after optimizer step "
                f"{ranks.schedule.steps} and has no leading components. The training has diverged: go back to a "
                "checkpoint before, lower the learning rate, clip the gradients, or look for NaN in the loss."
            )
