"""Weights of single rows, found on rows that are set aside: `sample_weights="meta"`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from peft_dynamic.functional.sample_weights import shares, slopes
from peft_dynamic.hosts.modes import eval_mode, evaluating


class MetaWeights:
    """The teacher's share of each row, by whether its losses fall together with those of the rows set aside.

    The passes are in eval mode: dropout is off, nothing is drawn, and a DyLoRA adapter has its full rank.

    Args:
        student: whose trained weights are moved for it, and put back.

    Raises:
        ValueError: a trained weight is in half precision, which rounds the moves away.
    """

    def __init__(self, student: Any) -> None:
        self.student = student
        self.direction: list[torch.Tensor] | None = None
        self._checked = False
        for name, p in student.named_parameters():
            if p.requires_grad and p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"sample_weights='meta' moves the trained weights a little, and {name} is {p.dtype}, which rounds "
                    "that away. Load the student in float32, or leave sample_weights out."
                )

    def aim(self, losses: Iterable[Callable[[], torch.Tensor]]) -> None:
        """Take the gradient of the rows set aside, of all processes.

        Args:
            losses: for each batch, what computes (2, N) losses of its labels and its teacher.

        Raises:
            ValueError: the student gives other losses for the same batch: it draws at random in eval mode.
        """
        trained = [p for p in self.student.parameters() if p.requires_grad]
        total, rows = [torch.zeros_like(p) for p in trained], torch.zeros(1, device=trained[0].device)
        with eval_mode(self.student), torch.enable_grad():
            for each in losses:
                found = each()
                self._check(found, each)
                rows += found.shape[1]
                gradients = torch.autograd.grad(found.sum(), trained, allow_unused=True)  # past DDP's hooks
                for kept, new in zip(total, gradients, strict=True):
                    if new is not None:
                        kept += new
        if dist.is_available() and dist.is_initialized():
            for kept in (rows, *total):
                dist.all_reduce(kept)
        self.direction = [kept / rows.clamp(min=1).to(kept) for kept in total]

    def shares(self, losses: Callable[[], torch.Tensor]) -> torch.Tensor:
        """(N,) the teacher's share in each row of a batch.

        Raises:
            ValueError: no gradient has been taken.
        """
        if self.direction is None:
            raise ValueError(
                "sample_weights='meta': no row has been set aside. In a loop of your own call distiller.aim(batches) "
                "before each step."
            )
        trained = [p for p in self.student.parameters() if p.requires_grad]
        with evaluating(self.student):
            return shares(*slopes(losses, trained, self.direction))

    def _check(self, found: torch.Tensor, losses: Callable[[], torch.Tensor]) -> None:
        if self._checked:
            return
        with torch.no_grad():
            again = losses()
        if not torch.allclose(found.detach(), again, rtol=1e-3, atol=1e-5):
            raise ValueError(
                "sample_weights='meta': the student gives other losses for one batch, also in eval mode, so that their "
                "differences would be noise. Take its dropout out (p=0), or leave sample_weights out."
            )
        self._checked = True
