"""A LoRA checkpoint as products: each module's factors and scale, and what else is in the file.

Notable: only safetensors are read. A pickle runs what it likes when it is loaded.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_dynamic.export import FILES, PEFT_PREFIX, check_target
from peft_dynamic.functional.ranks import alpha_at
from peft_dynamic.hub import REPO_ID, write_model_card
from peft_dynamic.methods import METHODS, REFUSED, method_of

_ENDS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
# Fields that make an adapter more than a product B A, with what to do instead.
_MORE = {
    "use_dora": "its magnitudes belong to the norm of one merged weight. Merge it into the base model",
    "lora_bias": "it has a bias beside its factors. Train without lora_bias, or merge it into the base model",
    "target_parameters": "its experts share a matrix, whose parts the file does not tell. Merge it into the base model",
    "layer_replication": "its layers are copies that the file does not name. Merge it into the base model",
}

# What leaves the update the product of the factors: a scale, a parallel layout, and starts that set the factors alone.
_HARMLESS = ("use_rslora", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config")


@dataclass
class Product:
    """s B A of one module, as the file has it.

    Attributes:
        a: (r, in ...), b: (out, r ...): as stored; of an embedding A is (r, tokens).
        scale: s.
        ends: the endings of the two tensors' names.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    ends: tuple[str, str]

    @property
    def rank(self) -> int:
        """How many components it has."""
        return len(self.a)

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A as (r, in), B as (out, r)."""
        return self.a.flatten(1), self.b.flatten(1)

    @property
    def cost(self) -> int:
        """Numbers in one component: in + out."""
        a, b = self.matrices
        return a.shape[1] + b.shape[0]

    def with_factors(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> Product:
        """The same module with other matrices."""
        shaped_a = a.reshape(len(a), *self.a.shape[1:]).to(self.a.dtype)
        shaped_b = b.reshape(*b.shape, *self.b.shape[2:]).to(self.b.dtype)
        return Product(shaped_a.contiguous(), shaped_b.contiguous(), scale, self.ends)


@dataclass
class LoraCheckpoint:
    """An adapter that was read.

    Attributes:
        name: what messages call it.
        config: its `LoraConfig`, or that of a method of ours.
        products: module, with its whole name in the file -> its product.
        others: what else the file has: biases, modules that were trained whole, trained tokens.
    """

    name: str
    config: Any
    products: dict[str, Product]
    others: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Numbers in all products."""
        return sum(product.rank * product.cost for product in self.products.values())


def read_checkpoint(adapter: str | os.PathLike[str]) -> LoraCheckpoint:
    """Read an adapter's folder, or fetch it from the Hub.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks the configuration or the safetensors.
        ValueError: it is no LoRA, has a variant that is more than a product, or its tensors do not fit, or are not
            finite.
    """
    folder = _folder(adapter)
    name = f"adapter={str(adapter)!r}"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            fix = "Pass a folder that save_pretrained wrote."
            if file != "adapter_config.json" and (folder / "adapter_model.bin").is_file():
                fix = "adapter_model.bin is a pickle, which runs what it likes when loaded: save it as safetensors."
            raise FileNotFoundError(f"{name} has no {file}. {fix}")
    try:
        written = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = written["peft_type"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: adapter_config.json cannot be read ({error!r}). Save the adapter again.") from error
    config = _config(written, folder, name)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{name}: adapter_model.safetensors is damaged ({error}). Take another copy.") from error
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{name} has NaN or infinite values in {broken[0]}. Take an earlier checkpoint.")
    return _parted(str(adapter), kind, config, tensors, name)


def _folder(adapter: str | os.PathLike[str]) -> Path:
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(adapter, str) and REPO_ID.fullmatch(adapter) and "/" in adapter and not folder.exists():
        patterns = ["adapter_config.json", "adapter_model.safetensors"]
        return Path(snapshot_download(adapter, allow_patterns=patterns))
    raise FileNotFoundError(
        f"adapter={str(adapter)!r} is no folder and no name on the Hub. Pass the folder of a saved adapter, or "
        "'user/name'."
    )


def _config(written: Mapping[str, Any], folder: Path, name: str) -> Any:
    kind, method = written["peft_type"], method_of(written)
    if kind != "LORA" and (method is None or not method.engines):
        known = ", ".join(["LORA", *(each.name for each in METHODS.values() if each.engines)])
        raise ValueError(f"{name} is a {kind} adapter, which is no product of two factors. There are: {known}.")
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: adapter_config.json does not make a configuration ({error}).") from error
    for field_name in (*_MORE, *REFUSED):
        value = getattr(config, field_name, None)
        if field_name in _HARMLESS or value in (None, False, {}, []):
            continue
        reason = _MORE.get(field_name, "its update is not the product of its factors. Merge it into the base model")
        raise ValueError(f"{name} has {field_name}={value!r}: {reason}.")
    start = str(getattr(config, "init_lora_weights", True))
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga", "mica")):
        raise ValueError(
            f"{name} was started with init_lora_weights={start!r}, which changed the base weights: its product is not "
            "its update. Save it with path_initial_model_for_weight_conversion first."
        )
    return config


def _parted(shown: str, kind: str, config: Any, tensors: dict[str, torch.Tensor], name: str) -> LoraCheckpoint:
    products: dict[str, Product] = {}
    others = dict(tensors)
    for key in tensors:
        for ends in _ENDS:
            if not key.endswith(ends[0]):
                continue
            module = key.removesuffix(ends[0])
            a, b = others.pop(key), others.pop(module + ends[1], None)
            if b is None:
                raise ValueError(f"{name} has {key} and no {module}{ends[1]}. The file is incomplete.")
            mixer = others.pop(f"{module}.lora_mixer.weight", None)
            if mixer is not None:
                a = _mixed(a, mixer, module, name)
            _check_shapes(a, b, config, module, name)
            products[module] = Product(a, b, _scale(config, module, len(a)), ends)
    if any(".cores" in key for key in others):
        raise ValueError(
            f"{name} is a {kind} adapter, whose factors are tensor trains of a shape that the file does not tell. Load "
            "it on its base model, write it with export_lora, and pass that folder."
        )
    if not products:
        raise ValueError(f"{name} has no LoRA factors in its file.")
    others = {key: value for key, value in others.items() if ".lora_schedule." not in key}
    return LoraCheckpoint(shown, config, products, others)


def _mixed(a: torch.Tensor, mixer: torch.Tensor, module: str, name: str) -> torch.Tensor:
    if len(mixer) != 1 or mixer.shape[1:] != (len(a), len(a)):
        raise ValueError(f"{name}: {module} has a mixer per group or expert. Write the adapter with export_lora first.")
    return (mixer[0].double() @ a.flatten(1).double()).to(a.dtype).view(a.shape)


def _check_shapes(a: torch.Tensor, b: torch.Tensor, config: Any, module: str, name: str) -> None:
    rank = _of_pattern(config.rank_pattern, module, config.r)
    fits = a.dim() >= 2 and b.dim() >= 2 and len(a) == b.shape[1] == rank and b.flatten(1).shape[1] == rank
    if not fits:
        raise ValueError(
            f"{name}: {module} has factors of shape {tuple(a.shape)} and {tuple(b.shape)}, and rank {rank} by its "
            "configuration. A grouped convolution, or a damaged file: merge the adapter, or take another copy."
        )


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), module.removeprefix(PEFT_PREFIX)), otherwise)


def _scale(config: Any, module: str, rank: int) -> float:
    alpha = _of_pattern(config.alpha_pattern, module, config.lora_alpha)
    if getattr(config, "use_rslora", False):
        return float(alpha) / math.sqrt(rank)
    rule = getattr(config, "scaling", None)
    return float(alpha_at(rule, alpha, rank, rank) if isinstance(rule, str) else alpha) / rank


def write_checkpoint(made: LoraCheckpoint, out: str | os.PathLike[str]) -> Path:
    """Write a stock LoRA checkpoint; what is there before stays as it is if that fails.

    Modules of rank 0 are left out of the targets: PEFT has no such rank.

    Raises:
        ValueError: no module is left.
        FileExistsError, NotADirectoryError, PermissionError: as in `export_lora`.
    """
    target = check_target(os.fspath(out))
    kept = {module: product for module, product in made.products.items() if product.rank}
    if not kept:
        raise ValueError(f"out={str(out)!r}: no module would be left. Pass a larger rank or budget.")
    config = _stock_config(made, kept)
    tensors = dict(made.others)
    for module, product in kept.items():
        tensors[module + product.ends[0]], tensors[module + product.ends[1]] = product.a, product.b
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target if target.is_dir() else target.parent
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{target.name}-") as work:
        folder = Path(work) / target.name
        config.save_pretrained(str(folder), auto_mapping_dict=None if config.task_type else made.config.auto_mapping)
        plain = {key: value.contiguous().clone() for key, value in tensors.items()}  # no tensor twice
        save_file(plain, folder / FILES[1], metadata={"format": "pt"})
        write_model_card(folder)
        target.mkdir(exist_ok=True)
        for file in FILES:
            os.replace(folder / file, target / file)
    return Path(out)


def _stock_config(made: LoraCheckpoint, kept: dict[str, Product]) -> LoraConfig:
    ours = made.config
    settings = {module: (product.rank, product.scale * product.rank) for module, product in kept.items()}
    rank, alpha = Counter(settings.values()).most_common(1)[0][0]
    same = set(kept) == set(made.products)
    names = [module.removeprefix(PEFT_PREFIX) for module in kept]
    carried = ("task_type", "fan_in_fan_out", "bias", "modules_to_save", "trainable_token_indices", "revision")
    return LoraConfig(
        **{name: copy(getattr(ours, name)) for name in carried},
        r=rank,
        lora_alpha=_whole(alpha),
        target_modules=copy(ours.target_modules) if same else names,
        exclude_modules=copy(ours.exclude_modules) if same else None,
        layers_to_transform=ours.layers_to_transform if same else None,
        layers_pattern=ours.layers_pattern if same else None,
        rank_pattern={_exactly(m): b for m, (b, _) in settings.items() if b != rank},
        alpha_pattern={_exactly(m): _whole(x) for m, (_, x) in settings.items() if x != alpha},
        base_model_name_or_path=ours.base_model_name_or_path,
        inference_mode=True,
    )


def _exactly(module: str) -> str:
    return "^" + module.removeprefix(PEFT_PREFIX).replace(".", r"\.")


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value
