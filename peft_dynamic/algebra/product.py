"""One module's update as PEFT stores it: a product, or one for each expert or group of the module."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch


@dataclass
class Product:
    """s B A of one module, as the file has it; or n products of it, one for each expert or group.

    Attributes:
        a: (r, in ...), b: (out, r ...): as stored; of an embedding A is (r, tokens). n experts of a 3-D parameter are
            (n r, in), experts first, and (out, r n), experts last. A convolution of n groups has (out, r / n ...).
        scale: s.
        ends: the endings of the two tensors' names.
        keys: the names that PEFT may look up in `rank_pattern` for it, without its prefix. Of several parameters of
            one module the file does not tell which is which: they have the same keys, and keep one rank.
        experts: n of a parameter, 1 otherwise.
        groups: n of a convolution, 1 otherwise.
        of_parameter: it is one of `target_parameters`.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    ends: tuple[str, str]
    keys: tuple[str, ...] = ()
    experts: int = 1
    groups: int = 1
    of_parameter: bool = False

    @property
    def rank(self) -> int:
        """r, as PEFT counts it: components of each expert, and of all groups together."""
        return len(self.a) // self.experts

    @property
    def alpha(self) -> float:
        """The shortest `lora_alpha` with alpha / r = s to the bit: the product s r may be next to it."""
        near = self.scale * self.rank
        beside = (float(f"{near:.15g}"), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
        return next((alpha for alpha in beside if self.rank and alpha / self.rank == self.scale), near)

    @property
    def steps(self) -> int:
        """How many ranks it can have above 0: a convolution's are multiples of its groups."""
        return self.rank // self.groups

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A as (n, steps, in), B as (n, out, steps)."""
        count = self.experts * self.groups
        a = self.a.reshape(count, self.steps, -1)
        if self.experts > 1:
            return a, self.b.reshape(len(self.b), self.steps, count).permute(2, 0, 1)
        return a, self.b.reshape(count, -1, self.steps)

    @property
    def cost(self) -> int:
        """Numbers in one step: in + out, for each expert; of a group its share of out."""
        a, b = self.matrices
        return len(a) * (a.shape[2] + b.shape[1])

    @property
    def size(self) -> int:
        """Numbers in it."""
        return self.steps * self.cost

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be the same of two products that are added up."""
        return (*self.a.shape[1:], len(self.b), self.experts, self.groups, self.of_parameter)

    def zeros(self) -> Product:
        """The same module with one step of zeros."""
        a = self.a.new_zeros(self.experts * self.groups, *self.a.shape[1:])
        return replace(self, a=a, b=self.b.new_zeros(len(self.b), self.experts, *self.b.shape[2:]))

    def with_factors(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> Product:
        """The same module with other matrices: A as (n, steps, in), B as (n, out, steps)."""
        shaped_a = a.reshape(-1, *self.a.shape[1:]).to(self.a.dtype)
        if self.experts > 1:
            b = b.permute(1, 2, 0)
        width = b.shape[1] * b.shape[2] if self.experts > 1 else b.shape[2]
        shaped_b = b.reshape(len(self.b), width, *self.b.shape[2:]).to(self.b.dtype)
        return replace(self, a=shaped_a.contiguous(), b=shaped_b.contiguous(), scale=scale)
