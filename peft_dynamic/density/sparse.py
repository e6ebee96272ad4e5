"""Decoding that skips inactive neurons: a sparse path through the feed-forward blocks of a model on the CPU.

Notable: the weights of a down-projection are laid out by neuron, as the transposed view of a contiguous (neurons,
outputs) matrix. There is no second copy that could go stale: a merge, or anything else that writes the weights, writes
what the sparse path reads. Which linear layers belong to an activation is read off the first forward pass, from the
tensors themselves, not from names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.functional import embedding_bag
from transformers.pytorch_utils import Conv1D

from peft_dynamic.density.collect import roots
from peft_dynamic.density.cut import thresholds_of
from peft_dynamic.functional.density import count_active
from peft_dynamic.hosts.blocks import linear_features
from peft_dynamic.rules import is_finite

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GRID = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass
class SparseLayer:
    """What the sparse path does with one feed-forward block.

    Attributes:
        name: of the activation.
        density: share of active neurons in the first forward pass, after the threshold.
        break_even: density above which the dense product is faster; 0 where nothing is skipped at all.
        gated: whether rows of a second projection are skipped too.
        used: whether single tokens take the sparse path at all: `density` is below `break_even`.
        sparse_tokens, dense_tokens: single tokens that took either path since.
    """

    name: str
    density: float
    break_even: float
    gated: bool
    used: bool
    sparse_tokens: int = 0
    dense_tokens: int = 0


@dataclass
class _State:
    """An activation, the linear layers found for it, and the active neurons of the token on its way to them."""

    name: str
    module: nn.Module
    threshold: float = 0.0
    row: SparseLayer | None = None
    output: torch.Tensor | None = None  # during the first forward pass
    gate: list[tuple[nn.Module, torch.Tensor]] = field(default_factory=list)
    neurons: torch.Tensor | None = None

    def select(self, a: torch.Tensor) -> None:
        """Take note of the active neurons of a single token, if it is to take the sparse path."""
        self.neurons = None
        if self.row is None or not self.row.used or not _is_one_token(a):
            return
        neurons = a.reshape(-1).nonzero()[:, 0]
        if len(neurons) <= self.row.break_even * a.shape[-1]:
            self.neurons = neurons
            self.row.sparse_tokens += 1
        else:
            self.row.dense_tokens += 1

    def patch(self, down: nn.Linear | Conv1D, up: nn.Linear | None) -> list[nn.Module]:
        """Put the sparse path in front of the layers' own; returns the layers."""
        if isinstance(down, nn.Linear):
            down.weight.data = down.weight.data.t().contiguous().t()
        down.forward = partial(_down, self, down, down.forward)  # type: ignore[method-assign]  # of one instance
        if up is None:
            return [down]
        up.forward = partial(_up, self, up, up.forward)  # type: ignore[method-assign]  # as above
        return [down, up]


class SparseInference:
    """A model whose single tokens compute only the active neurons; made by `sparse_inference`.

    Attributes:
        thresholds: name of an activation -> the size up to which it is 0, on both paths.
        layers: a `SparseLayer` for each activation whose projections are known; empty before the first forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float | Mapping[str, float] = 0.0,
        max_density: float | None = None,
        activation_modules: str | Sequence[str] | None = None,
    ) -> None:
        if not isinstance(threshold, Mapping) and (not is_finite(threshold) or threshold < 0):
            raise ValueError(f"threshold must be a number of at least 0, got {threshold!r}. 0 skips exact zeros only.")
        if max_density is not None and (not is_finite(max_density) or not 0 <= max_density <= 1):
            raise ValueError(f"max_density must be a number from 0 to 1 or None to measure it, got {max_density!r}.")
        if model.training:
            raise ValueError("sparse_inference needs a model in eval mode: call model.eval() first.")
        self.max_density = max_density
        found, self.thresholds = thresholds_of(model, threshold, activation_modules)
        self._states = [_State(item.name, item.module, self.thresholds[item.name]) for item in found]
        self._outer = _linear_layers(model)
        _check(self._outer)
        self._patched: list[nn.Module] = []
        self._even: dict[tuple, float] = {}
        self._handles = [state.module.register_forward_hook(partial(self._active, state)) for state in self._states]
        self._watchers = [layer.register_forward_pre_hook(self._before) for layer in self._outer]
        self._watchers += [layer.register_forward_hook(self._after) for layer in self._outer]
        self._watchers += [root.register_forward_hook(self._learned) for root in roots(model)]

    @property
    def layers(self) -> list[SparseLayer]:
        """One row for each activation whose projections are known."""
        return [state.row for state in self._states if state.row is not None]

    def detach(self) -> None:
        """Give the model back as it was: its own forward methods and a contiguous layout of the weights."""
        self._unwatch()
        for handle in self._handles:
            handle.remove()
        for module in self._patched:
            del module.forward
            if isinstance(module, nn.Linear) and not module.weight.is_contiguous():
                module.weight.data = module.weight.data.contiguous()
        self._patched, self._handles = [], []

    def __enter__(self) -> SparseInference:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # --- the first forward pass: which linear layers belong to which activation

    def _active(self, state: _State, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if module.training:
            raise RuntimeError("the model is in training mode under sparse_inference: detach() it, or call eval().")
        result = output
        if state.threshold:
            result = output.masked_fill(output.abs() <= state.threshold, 0)
        if self._watchers and state.row is None:
            state.output, state.gate = result, []
        state.select(result.detach())
        return result if state.threshold else None

    def _before(self, module: nn.Module, args: tuple) -> None:
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor):
            return
        for state in self._states:
            a = state.output
            if a is None or a.shape != x.shape:
                continue
            gate = next((layer for layer, u in state.gate if torch.equal((a * u).to(x.dtype), x)), None)
            if gate is not None or torch.equal(a.to(x.dtype), x):
                state.output, state.gate = None, []
                self._take(state, a, module, gate)
                return

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        for state in self._states:
            if state.output is not None and isinstance(output, torch.Tensor) and output.shape == state.output.shape:
                state.gate.append((module, output))

    def _take(self, state: _State, a: torch.Tensor, down: nn.Module, gate: nn.Module | None) -> None:
        """Decide on one block, from the density of the tokens seen and the break-even of its shape."""
        base = self._outer[down]
        up = self._outer[gate] if gate is not None and isinstance(self._outer[gate], nn.Linear) else None
        active, total = count_active(a.detach())
        even = self.max_density
        if even is None:
            key = (a.shape[-1], base.weight.numel() // a.shape[-1], base.weight.dtype, up is not None)
            if key not in self._even:
                self._even[key] = break_even(*key)
            even = self._even[key]
        density = active / total
        state.row = SparseLayer(state.name, density, even, up is not None, density <= even and even > 0)
        if state.row.used:
            self._patched += state.patch(base, up)

    def _learned(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._unwatch()
        for state in self._states:
            state.output, state.gate = None, []
        if not self.layers:
            raise RuntimeError(
                f"none of the activations {[state.name for state in self._states][:3]} ... is the input of a linear "
                "layer, alone or times the output of one, so there is nothing to skip. Leave sparse_inference out."
            )

    def _unwatch(self) -> None:
        for handle in self._watchers:
            handle.remove()
        self._watchers = []


def sparse_inference(
    model: nn.Module,
    threshold: float | Mapping[str, float] = 0.0,
    max_density: float | None = None,
    activation_modules: str | Sequence[str] | None = None,
) -> SparseInference:
    """Make single-token forward passes, as in decoding at batch 1, compute active neurons only. On the CPU.

        y = sum over f with |a_f| > threshold of  a_f u_f W[:, f]  + bias        u_f: 1, or in a gated block W_up[f] x

    With threshold 0 this is the model's own result up to the order of summation: what is skipped is exactly 0. With a
    threshold, smaller activations are 0 for prompts as for single tokens, as `measure_density` counts them; this is
    another function than the model's, to be evaluated before use.

        with sparse_inference(model) as sparse:
            model.generate(**inputs, max_new_tokens=100)
        print(sparse.layers)

    The first forward pass finds the projections of each activation and is dense. A block whose density in it is above
    its break-even stays dense, and so does a later token whose density is, and so do several tokens at once.

    Args:
        model: in eval mode, with or without PEFT; adapters, merged or not, are computed as always.
        threshold: activations with |a| <= threshold are 0; or a number for each, as `calibrate_cut` gives them: blocks
            that the dict does not name stay dense.
        max_density: break-even of all blocks; None to measure that of each shape on this machine (about a second).
        activation_modules: as in `ActivationDensityLoss`.

    Returns:
        The attached `SparseInference`; a context manager, and `detach()` ends it.

    Raises:
        ValueError: an argument has no meaning, the model is in training mode or not on the CPU, its linear layers are
            quantised or offloaded, or it has no activations that are found.
        RuntimeError: in the first forward pass, where no activation is the input of a linear layer.

    Source: the saving that Runwal et al., AAAI 2025, arXiv 2402.01911 point out; the path is ours.
    """
    return SparseInference(model, threshold, max_density, activation_modules)


def _down(state: _State, layer: nn.Linear | Conv1D, dense: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    neurons, state.neurons = state.neurons, None
    weight = layer.weight if isinstance(layer, Conv1D) else layer.weight.t()  # (neurons, outputs)
    if neurons is None or not _takes(x, weight):
        result: torch.Tensor = dense(x)
        return result
    y = weighted_rows(x, neurons, weight)
    return y if layer.bias is None else y + layer.bias


def _up(state: _State, layer: nn.Linear, dense: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    if state.neurons is None or not _takes(x, layer.weight):
        result: torch.Tensor = dense(x)
        return result
    return some_rows(x, state.neurons, layer.weight, layer.bias)


def weighted_rows(x: torch.Tensor, neurons: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product x W for one token of which only some entries are not 0: gathered, scaled and added up in one pass.

    Args:
        x: (..., neurons), one token.
        neurons: (active,) indices.
        weight: (neurons, outputs), contiguous.

    Returns:
        (..., outputs).
    """
    first = neurons.new_zeros(1)
    values = x.reshape(-1).index_select(0, neurons)
    return embedding_bag(neurons, weight, first, mode="sum", per_sample_weights=values).view(*x.shape[:-1], -1)


def some_rows(x: torch.Tensor, neurons: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The linear layer's output for one token at some of its neurons, and 0 at the others.

    Args:
        x: (..., inputs), one token.
        neurons: (active,) indices.
        weight: (neurons, inputs).
        bias: (neurons,) or None.

    Returns:
        (..., neurons).
    """
    values = torch.mv(weight.index_select(0, neurons), x.reshape(-1))
    if bias is not None:
        values = values + bias.index_select(0, neurons)
    return x.new_zeros(len(weight)).index_copy_(0, neurons, values).view(*x.shape[:-1], -1)


def break_even(neurons: int, outputs: int, dtype: torch.dtype, gated: bool = False, repeats: int = 7) -> float:
    """The density below which a block is faster on the sparse path for one token, on this machine and its threads.

    Blocks of an activation and the projections that skip are taken in turn, about 64 MiB of them, so that no cache
    holds the one that comes next, with the hooks that the sparse path has in a model.

    Args:
        neurons: inputs of the down-projection.
        outputs: outputs of it.
        dtype: of the weight.
        gated: with the projection of a gated block beside it.
        repeats: rounds, of which the median counts.

    Returns:
        The largest density of a grid up to which it is faster; 0 where it never is.
    """
    count = max(2, min(32, 2**26 // (outputs * neurons * dtype.itemsize * (1 + gated))))
    random = torch.randn(neurons, outputs)
    downs = [nn.Linear(neurons, outputs, bias=False, dtype=dtype, device="meta") for _ in range(count)]
    ups = [nn.Linear(outputs, neurons, bias=False, dtype=dtype, device="meta") for _ in range(count if gated else 0)]
    for layer in downs:
        layer.weight = nn.Parameter(random.t().to(dtype, copy=True).contiguous())
    for layer in ups:
        layer.weight = nn.Parameter(random.to(dtype, copy=True))
    states = [_State("", nn.ReLU()) for _ in range(count)]
    values, hidden = torch.rand(1, neurons).to(dtype), torch.randn(1, outputs).to(dtype)

    def taken(x: torch.Tensor) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for i, state in enumerate(states):
                a = state.module(x)
                downs[i](a * ups[i](hidden) if gated else a)
            times.append(time.perf_counter() - start)
        return sorted(times)[repeats // 2]

    even = 0.0
    with torch.no_grad():
        dense = taken(values)
        for i, state in enumerate(states):
            state.row = SparseLayer("", 0.0, 1.0, gated, True)
            state.patch(downs[i], ups[i] if gated else None)
            state.module.register_forward_hook(lambda _, args, a, state=state: state.select(a))
        for density in _GRID:
            if taken(values * (torch.rand(neurons) < density)) >= dense:
                break
            even = density
    return even


def _is_one_token(a: torch.Tensor) -> bool:
    return a.numel() == a.shape[-1] and not torch.is_grad_enabled()


def _takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the weight lies by neuron, and the product is computed in its dtype: autocast changes it."""
    return weight.is_contiguous() and x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)


def _linear_layers(model: nn.Module) -> dict[nn.Module, Any]:
    """The linear layers of the model without adapters: each module that is called -> the base layer inside it."""
    found: dict[nn.Module, Any] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside:
            continue
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if linear_features(base) is not None:
            found[module] = base
        if isinstance(module, BaseTunerLayer):
            inside.update(module.modules())
    return found


def _check(layers: dict[nn.Module, Any]) -> None:
    for layer in layers.values():
        if type(layer) not in (nn.Linear, Conv1D) or layer.weight.dtype not in DTYPES:
            raise ValueError(
                "sparse_inference reads the weights of nn.Linear and Conv1D in float32, float64, bfloat16 or float16; "
                f"the model has a {type(layer).__name__} of {layer.weight.dtype}. Load it without quantisation."
            )
        if type(layer.weight.data) is not torch.Tensor or layer.weight.device.type != "cpu":
            raise ValueError(
                f"sparse_inference works on a CPU, on whole weights; a layer's is a {type(layer.weight.data).__name__} "
                f"on {layer.weight.device}. It has been measured on no other device."
            )
        if "forward" in vars(layer):
            raise ValueError(
                "a linear layer has a forward method of its own: offloaded by accelerate, or under another "
                "sparse_inference. Load the model whole, or detach() the other one."
            )
