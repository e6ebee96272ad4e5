"""The mean of the weights over the last part of a training: `average_from`.

Of an adapter it is the mean of the products B A, which is what the model adds up; the mean of the factors has products
of one step's B with another's A in it. The mean has a larger rank than the adapter, and the adapter gets its best
approximation. Factors are kept as long as they are smaller than the matrix that they make, and then the matrix.

Source: P. Izmailov, D. Podoprikhin, T. Garipov, D. Vetrov, A. G. Wilson: Averaging Weights Leads to Wider Optima and
Better Generalization, UAI 2018, arXiv 1803.05407; for distilled language models Findings of EMNLP 2022,
arXiv 2212.05956.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_dynamic.functional.products import cut

_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
_KINDS = ("LORA", "DYLORA", "QDYLORA")
_BESIDE = ("use_dora", "use_qalora", "use_bdlora", "use_mixer", "target_parameters")  # more than a product


class Average:
    """The mean of what a student trains, over the steps at which it is asked to look.

    Args:
        student: a model, or one with a LoRA, DyLoRA or QDyLoRA.

    Raises:
        ValueError: an adapter whose update is no product of two matrices.
    """

    def __init__(self, student: Any) -> None:
        self.student, self.count = student, 0
        self.sums: dict[str, torch.Tensor] = {}
        self.products: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # by the name of A
        self.pairs = self._pairs()
        _check_adapters(student, [self._trained()[name] for name in self.pairs])

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.student.named_parameters() if p.requires_grad}

    def _pairs(self) -> dict[str, str]:
        """Name of A -> name of B, where both are trained; with one of them fixed the mean of the other is exact."""
        trained = self._trained()
        pairs = {name: name.replace(f".{a}.", f".{b}.") for a, b in _FACTORS for name in trained if f".{a}." in name}
        return {a: b for a, b in pairs.items() if b in trained}

    def empty(self) -> None:
        """Begin anew."""
        self.count, self.sums, self.products = 0, {}, {}

    def add(self) -> None:
        """Look at the weights as they are."""
        self.count += 1
        trained, paired = self._trained(), {*self.pairs, *self.pairs.values()}
        with torch.no_grad():
            for name, p in trained.items():
                if name not in paired:
                    self.sums[name] = self.sums[name] + p.float() if name in self.sums else p.float().clone()
            for name, other in self.pairs.items():
                self.products[name] = _added(self.products.get(name), trained[name].float(), trained[other].float())

    def put(self) -> None:
        """Give the student the mean, if there is one."""
        trained = self._trained()
        with torch.no_grad():
            for name, total in self.sums.items():
                trained[name].copy_(total / self.count)
            for name, (a, b) in self.products.items():
                low, high = cut(a, b.double() / self.count, len(trained[name]))
                trained[name].copy_(low)
                trained[self.pairs[name]].copy_(high)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has to keep."""
        found = {f"sum.{name}": value for name, value in self.sums.items()}
        for name, (a, b) in self.products.items():
            found |= {f"a.{name}": a, f"b.{name}": b}
        return found | {"count": torch.tensor(self.count)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """What `state` gave.

        Raises:
            ValueError: it is of other weights.
        """
        trained = self._trained()
        names = {name.partition(".")[2] for name in state} - {""}
        if not names <= trained.keys() or (int(state["count"]) and names | {*self.pairs.values()} != trained.keys()):
            raise ValueError("average_from: the checkpoint's mean is of other weights than are trained now.")
        self.count = int(state["count"])
        self.sums = {name: state[f"sum.{name}"].to(p.device) for name, p in trained.items() if f"sum.{name}" in state}
        self.products = {
            name: (state[f"a.{name}"].to(trained[name].device), state[f"b.{name}"].to(trained[name].device))
            for name in self.pairs
            if f"a.{name}" in state
        }


def _added(
    before: tuple[torch.Tensor, torch.Tensor] | None, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the sum, with one more product: beside each other, or the sum itself and the unit matrix."""
    if before is None:
        return a.clone(), b.clone()
    inputs, outputs = a.shape[1], b.shape[0]
    if len(before[0]) < inputs:
        both = torch.cat([before[0], a]), torch.cat([before[1], b], 1)
        if len(both[0]) * (inputs + outputs) < inputs * outputs and len(both[0]) < inputs:
            return both
        return torch.eye(inputs, device=a.device), (both[1].double() @ both[0].double()).float()
    return before[0], before[1] + b @ a


def _check_adapters(student: Any, factors: list[torch.nn.Parameter]) -> None:
    configs = getattr(student, "peft_config", {})
    for name in getattr(student, "active_adapters", []) if configs else []:
        config = configs[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        more = [f", {field}" for field in _BESIDE if getattr(config, field, None)]
        if kind not in _KINDS or more:
            raise ValueError(
                f"average_from: the adapter {name!r} ({kind}{''.join(more)}) is no product of two matrices, so "
                "the mean of its weights is not the mean of what they do. Leave average_from out, or train a LoRA."
            )
    if any(p.dim() != 2 for p in factors):
        raise ValueError(
            "average_from: the adapter has factors of a convolution, whose products are no matrices. Leave it out, or "
            "choose target_modules without them."
        )
