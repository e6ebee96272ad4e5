"""What an adapter's factors see of data: second moments of the size of the rank, by which a cut is calibrated."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from peft_dynamic.hosts.modes import eval_mode
from peft_dynamic.hosts.quantization import unpack_bnb_4bit
from peft_dynamic.tuners.checkpoint import PREFIX


@dataclass
class AdapterMoments:
    """Second moments of an adapter, by module as its file names it.

    Attributes:
        inputs: E[z z^T], (r, r) float64, with z = A x over the tokens that are no padding.
        losses: E[d d^T] / s^2, (r, r) float64, with d = dL/dz and s the module's scale; empty if it was not measured.
        tokens: how many tokens there were.
        marks: (2, r) float64, by which the factors are known again; empty for moments that `adapter_moments` did not
            make, and for factors that were in parts.
    """

    inputs: dict[str, torch.Tensor]
    losses: dict[str, torch.Tensor]
    tokens: int
    marks: dict[str, torch.Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        what = "inputs and gradients" if self.losses else "inputs"
        return f"AdapterMoments({len(self.inputs)} modules, {what}, {self.tokens:,} tokens)"

    def may_be_of(self, name: str, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether a module's factors can be those that were measured, up to a hundredth: files round them.

        Args:
            name: of the module, as in `inputs`.
            a: (r, in).
            b: (out, r).
        """
        there = self.marks.get(name)
        if there is None:
            return True
        own = mark_of(a, b)
        if own is None or own.shape != there.shape:
            return own is None
        size = torch.maximum(own.norm(dim=1), there.norm(dim=1))
        return bool(((own - there).norm(dim=1) <= 1e-2 * size).all())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write them as safetensors, with the number of tokens in the header; a file that is there stays on an error.

        Raises:
            FileExistsError: the path is a folder.
            NotADirectoryError, PermissionError: nothing can be written there.
        """
        path = Path(path)
        if path.is_dir():
            raise FileExistsError(f"path={str(path)!r} is a folder; pass the name of a file.")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise NotADirectoryError(f"path={str(path)!r}: {above} is a file, so there can be nothing in it.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(f"path={str(path)!r}: nothing can be written in {above}. Pass another path.")
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds = (("inputs", self.inputs), ("losses", self.losses), ("marks", self.marks))
        tensors = {f"{kind}.{name}": value for kind, part in kinds for name, value in part.items()}
        whole = {name: value.contiguous().clone() for name, value in tensors.items()}  # no tensor twice
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as work:
            made = Path(work) / path.name
            save_file(whole, made, metadata={"adapter_moments": json.dumps({"tokens": self.tokens})})
            os.replace(made, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AdapterMoments:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or holds something else.
        """
        fix = "Pass what AdapterMoments.save wrote, or measure again with adapter_moments."
        if not Path(path).is_file():
            raise FileNotFoundError(f"path={str(path)!r} is no file. {fix}")
        parts: dict[str, dict[str, torch.Tensor]] = {"inputs": {}, "losses": {}, "marks": {}}
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("adapter_moments", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            if about is None:
                raise ValueError("there is no note of adapter_moments in it")
            tokens = int(about["tokens"])
            for name, tensor in tensors.items():
                kind, _, module = name.partition(".")
                parts[kind][module] = tensor
            squares = (parts["inputs"], parts["losses"])
            sizes = [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in squares]
            if not sizes[0] or any(len(shape) != 2 or shape[0] != shape[1] for shape in sizes[0].values()):
                raise ValueError("it has no square matrices of inputs")
            if sizes[1] and sizes[1] != sizes[0]:
                raise ValueError("its matrices of inputs and losses differ")
        except (SafetensorError, ValueError, TypeError, KeyError, OSError) as error:
            raise ValueError(f"path={str(path)!r} holds no moments ({error}). {fix}") from error
        return cls(parts["inputs"], parts["losses"], tokens, parts["marks"])


def mark_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """A v and B^T u, (2, r), with v and u fixed; None for factors that are not here whole.

    Args:
        a: (r, in).
        b: (out, r).
    """
    for factor in (a, b):
        if factor.dim() != 2 or factor.is_meta or hasattr(factor, "placements") or not factor.numel():
            return None
    wide = [factor.detach().to("cpu", torch.float64) for factor in (a, b.mT)]
    return torch.stack([factor @ torch.arange(factor.shape[1], dtype=torch.float64).cos() for factor in wide])


def factors_of(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) of a layer as it computes with them."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def adapter_moments(
    model: Any, batches: Iterable[Mapping[str, torch.Tensor]], loss: bool = True, adapter_name: str | None = None
) -> AdapterMoments:
    """Measure what an adapter's factors see of some batches: E[z z^T] of each module and, with `loss`, E[d d^T] / s^2.

    Both are sums in float64 over the tokens that `attention_mask` keeps. The model runs in eval mode, so that dropout
    and gradient checkpointing are off. No gradient of a parameter is touched. Layers over a quantised base work too. A
    module that runs several times in a pass has the sum of its uses, and one that sees a row of each text, such as a
    pooler, the mean over the texts. Of an embedding z is the column of A of the token.

    Args:
        model: a `PeftModel`, or a transformers model, with LoRA layers; a DyLoRA adapter is measured at the set rank.
        batches: each the arguments of the model, `labels` among them with `loss`; a few are enough.
        loss: also measure the gradients, by a backward pass for each batch.
        adapter_name: the adapter; None for the first active one.

    Returns:
        The moments, for `resize_adapter(..., moments=)`.

    Raises:
        TypeError: `batches` is one batch, or a batch is no dict of tensors.
        ValueError: the model has no such adapter; it has a layer whose z no module gives, such as experts or a
            convolution, or one that no batch reached; there are no batches; a batch has no loss, or one that is not
            finite; or a mask does not fit what a module sees, as in the decoder of an encoder-decoder.
    """
    _check_batches(batches)
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    adapter, layers = _layers(model, adapter_name)
    found = _Sums({name: layer.scaling[adapter] for name, layer in layers.items()})
    handles = []
    for name, layer in layers.items():
        if adapter in layer.lora_embedding_A:
            handles.append(layer.register_forward_hook(found.embedding_hook(name, adapter)))
        else:
            handles.append(layer.lora_A[adapter].register_forward_hook(found.hook(name)))
    two_streams = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    unpack_bnb_4bit(model)
    try:
        with eval_mode(model), torch.set_grad_enabled(loss):
            for batch in batches:
                _check_batch(batch)
                found.begin(batch, two_streams)
                output = model(**batch)
                if loss:
                    found.backward(getattr(output, "loss", None))
    finally:
        for handle in handles:
            handle.remove()
    if not found.tokens:
        raise ValueError("batches is empty, or has padding alone: pass at least one batch with a token.")
    unseen = [name for name in found.scales if name not in found.inputs]
    if unseen:
        raise ValueError(
            f"{unseen[0]} ran in no batch: it is merged, disabled or not active, its module computes with the factors "
            "in another way, or it is an expert that got no token. Unmerge or activate the adapter, pass more batches, "
            "or resize without moments."
        )
    moments = found.moments(loss)
    marks = {name: mark_of(*factors_of(layer, adapter)) for name, layer in layers.items()}
    moments.marks = {name: mark for name, mark in marks.items() if mark is not None}
    return moments


def _check_batches(batches: Any) -> None:
    """Stop at what is one batch, and no list of them."""
    if isinstance(batches, Mapping | torch.Tensor | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be a list, or another iterable, of batches, each a dict of the model's arguments; got a "
            f"{type(batches).__name__}. Pass [batch] for one."
        )


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, Mapping) or not any(isinstance(value, torch.Tensor) for value in batch.values()):
        what = f"{type(batch).__name__} of {[*batch]}" if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(
            f"batches: a batch must be a dict of tensors, such as input_ids, attention_mask and labels, got a {what}."
        )


def _in_file(model: nn.Module, name: str) -> str:
    """A module's name as the adapter's file has it: of the PeftModel inside what is around it, DataParallel say."""
    for key, module in model.named_modules():
        if isinstance(module, PeftModel | PeftMixedModel):
            return name.removeprefix(f"{key}.")
    return PREFIX + name


def _layers(model: nn.Module, adapter_name: str | None) -> tuple[str, dict[str, Any]]:
    """The adapter, and its layers by their names in its file."""
    there: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "active_adapters")
    }
    known = {name for each in there.values() for name in (*each.lora_A, *each.lora_embedding_A)}
    active = dict.fromkeys(name for each in there.values() for name in each.active_adapters)
    wanted = [adapter_name] if adapter_name is not None else [*active]
    adapter = next((name for name in wanted if name in known), None)
    if adapter is None:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no LoRA layer with it, or with an active one.")
    layers: dict[str, Any] = {}
    for name, layer in there.items():
        if adapter not in layer.lora_A and adapter not in layer.lora_embedding_A:
            continue
        reason = ""
        if isinstance(layer, ParamWrapper):
            reason = "adapts a parameter: PEFT adds the update to the weight, and no module gives z of an expert"
        elif adapter in layer.lora_A and layer.lora_A[adapter].weight.dim() > 2:
            reason = "is a convolution, which sees places and not tokens"
        if reason:
            raise ValueError(f"{name} {reason}. Leave it out of the adapter, or resize without moments.")
        layers[_in_file(model, name)] = layer
    return adapter, layers


class _Sums:
    """Sums over the batches, and what one batch has seen so far."""

    def __init__(self, scales: dict[str, Any]) -> None:
        self.scales = scales
        self.inputs: dict[str, torch.Tensor] = {}
        self.losses: dict[str, torch.Tensor] = {}
        self.tokens = 0
        self.seen: list[tuple[str, torch.Tensor, torch.Tensor | None]] = []  # and what leads to d
        self.mask: torch.Tensor | None = None
        self.texts: dict[str, int] = {}  # how many rows a module saw that sees one of each text

    def begin(self, batch: Mapping[str, torch.Tensor], two_streams: bool) -> None:
        self.seen, mask = [], batch.get("attention_mask")
        self.mask = mask if mask is not None and mask.dim() == 2 else None
        if self.mask is not None and two_streams:
            raise ValueError(
                "the model is an encoder-decoder, whose attention_mask is of the encoder's tokens alone. Pass batches "
                "without padding and without attention_mask."
            )
        tensors = (value for value in batch.values() if isinstance(value, torch.Tensor))
        first = batch.get("input_ids", next(tensors))
        self.tokens += first.numel() if self.mask is None else int(self.mask.sum())

    def hook(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self._follow(name, output, None)
            self._add(self.inputs, name, output.detach(), 1.0)

        return note

    def embedding_hook(self, name: str, adapter: str) -> Any:
        """Of the layer itself: z is looked up, and d = s B^T g follows from the gradient g of the output."""

        def note(layer: Any, args: Any, output: torch.Tensor) -> None:
            scale = layer._get_embed_scale()  # which the base layer multiplies its output with, as Gemma's does
            z = layer.lora_embedding_A[adapter].detach().mT[args[0]]
            self._follow(name, output, layer.lora_embedding_B[adapter].detach() * float(self.scales[name]))
            self._add(self.inputs, name, z if scale is None else z * scale.to(z), 1.0)

        return note

    def _follow(self, name: str, output: torch.Tensor, through: torch.Tensor | None) -> None:
        if torch.is_grad_enabled():
            if not output.requires_grad:
                output.requires_grad_(True)  # nothing in front of it is trained
            self.seen.append((name, output, through))

    def backward(self, loss: Any) -> None:
        if not isinstance(loss, torch.Tensor):
            raise ValueError(
                "a batch gives no loss: pass labels in it, and a model whose output has a loss, or loss=False to "
                "measure the inputs alone."
            )
        if not bool(loss.isfinite().all()):
            raise ValueError(
                f"a batch has the loss {loss.detach()}: all its labels are -100, or the model overflows. Leave the "
                "batch out, or pass loss=False to measure the inputs alone."
            )
        if not self.seen:
            return
        gradients = torch.autograd.grad(loss, [output for _, output, _ in self.seen], allow_unused=True)
        for (name, output, through), gradient in zip(self.seen, gradients, strict=True):
            d = torch.zeros_like(output) if gradient is None else gradient
            d = d if through is None else d.to(through) @ through
            self._add(self.losses, name, d, 1 / float(self.scales[name]) ** 2)
        self.seen = []

    def _add(self, sums: dict[str, torch.Tensor], name: str, rows: torch.Tensor, factor: float) -> None:
        per_text = self.mask is not None and rows.shape[:-1].numel() == len(self.mask) != self.mask.numel()
        if per_text:  # a pooler: it sees one row of each text, and no padding
            self.texts[name] = self.texts.get(name, 0) + (len(rows) if sums is self.inputs else 0)
        elif self.mask is not None:
            if rows.shape[:-1].numel() != self.mask.numel():
                raise ValueError(
                    f"the attention_mask of shape {tuple(self.mask.shape)} does not fit what {name} sees, "
                    f"{tuple(rows.shape)}: other tokens. Pass batches without padding and "
                    "without attention_mask, or leave the module out of the adapter."
                )
            rows = rows.reshape(self.mask.numel(), -1)[self.mask.flatten().to(rows.device) != 0]
        wide = rows.reshape(-1, rows.shape[-1]).double()
        moment = (wide.mT @ wide).cpu() * factor
        sums[name] = sums[name] + moment if name in sums else moment

    def moments(self, loss: bool) -> AdapterMoments:
        count = max(self.tokens, 1)
        # the gradients are over all tokens, for modules that see fewer rows too: so worths compare between modules
        inputs = {name: value / self.texts.get(name, count) for name, value in self.inputs.items()}
        losses = {name: value / count for name, value in self.losses.items()} if loss else {}
        return AdapterMoments(inputs, losses, self.tokens)
