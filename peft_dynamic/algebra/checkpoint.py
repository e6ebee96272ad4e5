"""A LoRA checkpoint as products: each module's factors and scale, and what else is in the file.

Notable: only safetensors are read. A pickle runs what it likes when it is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_dynamic.algebra.experts import Place, candidates, host_of, places
from peft_dynamic.algebra.product import Product
from peft_dynamic.algebra.trains import matrices_of_cores
from peft_dynamic.cards import REPO_ID, write_model_card
from peft_dynamic.engines import fit
from peft_dynamic.export import FILES, PEFT_PREFIX, as_whole, exactly, only
from peft_dynamic.functional.ranks import alpha_at
from peft_dynamic.functional.scales import scale_columns
from peft_dynamic.methods import METHODS, method_of
from peft_dynamic.rules import check_apart as check_apart  # here before
from peft_dynamic.rules import check_path, check_target
from peft_dynamic.tuners.lora_fields import check_file_fields, check_product

_ENDS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
SCALES = ".lora_scales.weight"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What a file does not tell, beside the fields that make an adapter more than a product.
UNTOLD = {
    "layer_replication": "its layers are copies that the file does not name. Merge it into the base model",
    "ensure_weight_tying": "layers share their factors, which the file has twice. Load it and use export_lora",
}


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
        return sum(product.size for product in self.products.values())

    @property
    def shared(self) -> list[list[str]]:
        """The modules by what keeps one rank: each by itself, but for parameters that the file does not tell apart."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for module, product in self.products.items():
            groups.setdefault(product.keys, []).append(module)
        return [*groups.values()]


def read_checkpoint(adapter: str | os.PathLike[str]) -> LoraCheckpoint:
    """Read an adapter's folder, or fetch it from the Hub.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks the configuration or the safetensors.
        ValueError: it is no LoRA, has a variant that is more than a product, or its tensors do not fit, or are not
            finite.
    """
    folder = folder_of(adapter)
    name = f"adapter={str(adapter)!r}"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            fix = "Pass a folder that save_pretrained wrote."
            if file != "adapter_config.json" and (folder / "adapter_model.bin").is_file():
                fix = "adapter_model.bin is a pickle, which runs what it likes when loaded: save it as safetensors."
            raise FileNotFoundError(f"{name} has no {file}. {fix}")
    try:
        written = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        written["peft_type"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: adapter_config.json cannot be read ({error!r}). Save the adapter again.") from error
    config = _config(written, folder, name)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{name}: adapter_model.safetensors is damaged ({error}). Take another copy.") from error
    broken = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise ValueError(f"{name} has NaN or infinite values in {broken[0]}. Take an earlier checkpoint.")
    return _parted(str(adapter), config, tensors, name)


def _is_finite(tensor: torch.Tensor) -> bool:
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor  # of eight bits
    return bool(wide.isfinite().all())


def folder_of(adapter: str | os.PathLike[str]) -> Path:
    """The folder of an adapter, fetched from the Hub if it is a name there; FileNotFoundError if it is neither."""
    check_path("adapter", adapter)
    folder = Path(adapter).expanduser()
    if adapter != "" and folder.is_dir():  # which Path takes for the current one
        return folder
    if isinstance(adapter, str) and REPO_ID.fullmatch(adapter) and "/" in adapter and not folder.exists():
        patterns = ["adapter_config.json", "adapter_model.safetensors"]
        try:
            return Path(snapshot_download(adapter, allow_patterns=patterns))
        except OSError as error:  # of the Hub's errors too: a name that nobody has is often a path with a slip
            raise FileNotFoundError(
                f"adapter={adapter!r} is no folder here, and could not be had from the Hub "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the path, or the name."
            ) from error
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
        if kind == "LORA":  # ours check themselves
            check_file_fields(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: adapter_config.json does not make a configuration ({error}).") from error
    check_product(config, name, UNTOLD)
    fields = {each.name for each in dataclasses.fields(config)}
    unknown = [key for key, value in written.items() if key not in fields and value not in (None, False, {}, [])]
    if unknown:  # PEFT says so too, where the command shows it to nobody
        warnings.warn(
            f"{name}: adapter_config.json has {', '.join(unknown)}, of a newer PEFT or another program. It is not "
            "known here, and is left out: where it changes what the adapter computes, the result is another.",
            stacklevel=1,
        )
    return config


def _parted(shown: str, config: Any, tensors: dict[str, torch.Tensor], name: str) -> LoraCheckpoint:
    if any(key.endswith(".lora_A.cores") for key in tensors):
        tensors, config = matrices_of_cores(tensors, config, name, lambda key: int(settings_of(config, key)[0]))
    found: dict[str, tuple[torch.Tensor, torch.Tensor, tuple[str, str]]] = {}
    others = dict(tensors)
    for key in tensors:
        for ends in _ENDS:
            if not key.endswith(ends[0]):
                continue
            module = key.removesuffix(ends[0])
            a, b = others.pop(key), others.pop(module + ends[1], None)
            if b is None:
                raise ValueError(f"{name} has {key} and no {module}{ends[1]}. The file is incomplete.")
            found[module] = a, b, ends
    if not found:
        raise ValueError(f"{name} has no LoRA factors in its file.")
    products = _products(found, config, name)
    for module, product in products.items():
        mixer = others.pop(f"{module}.lora_mixer.weight", None)
        if mixer is not None:
            products[module] = _mixed(product, mixer, module, name)
    products = scaled(products, {key: others.pop(key) for key in [*others] if key.endswith(SCALES)}, config, name)
    others = {key: value for key, value in others.items() if ".lora_schedule." not in key}
    for key in others:
        module, found_part, _ = key.partition(".lora_")
        if key.endswith(tuple(ends[1] for ends in _ENDS)):
            raise ValueError(f"{name} has {key} and no A beside it. The file is incomplete.")
        if found_part and module in products:
            raise ValueError(
                f"{name} has {key}, which is more than a product of two factors, and its configuration does not say "
                "what it is for. Merge it into its base model."
            )
    return LoraCheckpoint(shown, config, products, others)


def _products(found: Mapping[str, tuple[Any, Any, tuple[str, str]]], config: Any, name: str) -> dict[str, Product]:
    """Each module's product, and how many experts or groups it has."""
    wrapped: dict[str, dict[str, int]] = {}  # module -> wrapper of one of its parameters -> rows of A
    targets = getattr(config, "target_parameters", None) or []
    for module, (a, _, _) in found.items():
        host = host_of(module.removeprefix(PEFT_PREFIX))
        # PEFT takes a layer whole or by its parameters; a name without a dot may be a parameter of any
        may = candidates(host, targets) and ".base_layer." not in host
        if may and not check_target_module_exists(config, host):
            wrapped.setdefault(host, {})[module] = len(a)
    told: dict[str, Place] = {}
    for host, rows in wrapped.items():
        try:
            told |= places(rows, candidates(host, targets), lambda key: settings_of(config, key))
        except ValueError as error:
            raise ValueError(
                f"{name}: of the parameters of {host} {error}. Merge the adapter into its base model."
            ) from error
    products = {}
    for module, (a, b, ends) in found.items():
        place = told.get(module)
        if place is not None:
            product = Product(a, b, 1.0, ends, place.keys, experts=place.experts, of_parameter=True)
        else:
            # the projection of nn.MultiheadAttention has the rank of the attention around it
            key = module.removeprefix(PEFT_PREFIX).partition(".base_layer")[0]
            groups = len(a) // b.shape[1] if a.dim() > 2 and b.dim() > 2 else 1
            product = Product(a, b, 1.0, ends, (key,), groups=max(groups, 1))
        _check_shapes(product, config, module, name)
        product.scale = _scale(config, product.keys[0], product.rank)
        products[module] = product
    return products


def _mixed(product: Product, mixer: torch.Tensor, module: str, name: str) -> Product:
    a, b = product.matrices
    if mixer.shape != (len(a), product.steps, product.steps):
        raise ValueError(
            f"{name}: {module} has a mixer of shape {tuple(mixer.shape)} for factors of rank {product.rank}. "
            "The file is damaged: take another copy."
        )
    return product.with_factors(mixer.double() @ a.double(), b, product.scale)


def scaled(
    products: Mapping[str, Product], scales: Mapping[str, torch.Tensor], config: Any, name: str
) -> dict[str, Product]:
    """The products of a ScaLearn adapter with omega in B, as the layers compute them; others as they are.

    Args:
        products: of the file.
        scales: the file's tensors of omega; one, if all layers share it.
        config: the adapter's.
        name: what messages call it.
    """
    if not scales:
        return dict(products)
    made = {}
    for module, product in products.items():
        ranks = config.sources.get(product.keys[0], {})
        omega = next(iter(scales.values())) if config.shared else scales.get(f"{module}{SCALES}")
        if omega is not None and config.shared:
            omega = omega[[row for row, source in enumerate(config.adapters) if source in ranks]]
        fits = omega is not None and len(omega) == len(ranks) and omega.shape[1:] in {(1,), (len(product.b),)}
        if omega is None or not fits or sum(ranks.values()) != product.steps:
            raise ValueError(
                f"{name}: the scales of {module} do not fit its factors, of which the configuration says {ranks}. The "
                "file is damaged: take another copy."
            )
        made[module] = replace(product, b=scale_columns(product.b, omega, [*ranks.values()], product.experts))
    return made


def settings_of(config: Any, key: str) -> tuple[int, float]:
    """The rank and the `lora_alpha` of a module, by its name or the patterns."""
    return _of_pattern(config.rank_pattern, key, config.r), _of_pattern(config.alpha_pattern, key, config.lora_alpha)


def _check_shapes(product: Product, config: Any, module: str, name: str) -> None:
    a, b, count = product.a, product.b, product.experts
    rank = settings_of(config, product.keys[0])[0]
    fits = a.dim() >= 2 and b.dim() >= 2 and product.rank == rank
    if fits and not (a.dtype in _DTYPES and b.dtype in _DTYPES):
        raise ValueError(
            f"{name}: {module} has factors of {a.dtype} and {b.dtype}, in which sums would be lost to rounding. Save "
            "the adapter in bfloat16, float16 or float32."
        )
    fits = fits and len(a) == b.shape[1] * product.groups == rank * count and len(b) % product.groups == 0
    if not fits or b[0, 0].numel() != 1:
        raise ValueError(
            f"{name}: {module} has factors of shape {tuple(a.shape)} and {tuple(b.shape)}, and rank {rank} by its "
            "configuration. The file is damaged: take another copy."
        )


def _of_pattern(pattern: Mapping[str, Any] | None, key: str, otherwise: Any) -> Any:
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), key), otherwise)


def _scale(config: Any, key: str, rank: int) -> float:
    alpha = settings_of(config, key)[1]
    if getattr(config, "use_rslora", False):
        return float(alpha) / math.sqrt(rank)
    rule = getattr(config, "scaling", None)
    return float(alpha_at(rule, alpha, rank, rank) if isinstance(rule, str) else alpha) / rank


def targets_of(products: Mapping[str, Product]) -> dict[str, Any]:
    """The fields that name exactly these modules and parameters."""
    modules = dict.fromkeys(product.keys[0] for product in products.values() if not product.of_parameter)
    parameters = dict.fromkeys(key for product in products.values() if product.of_parameter for key in product.keys)
    return {
        "target_modules": [*modules],
        "target_parameters": [*parameters] or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _renamed(kept: Mapping[str, Product]) -> dict[str, Product]:
    """As PEFT names them where some wrappers of a module's parameters are left out: the outermost has its name."""
    inside: Counter[str] = Counter()
    named = {}
    for module in sorted(kept, key=len):
        product, host = kept[module], host_of(module)
        if product.of_parameter:
            named[module] = host + ".base_layer" * inside[host]
            inside[host] += 1
    return {named.get(module, module): product for module, product in kept.items()}


def _unwrapped(key: str, left_out: Collection[str]) -> str:
    """The name of a tensor whose module may have no adapter any more: a saved embedding, say."""
    module, found, end = key.partition(".base_layer.")
    return f"{module}.{end}" if found and module in left_out else key


def write_checkpoint(
    made: LoraCheckpoint,
    out: str | os.PathLike[str],
    engine: str = "peft",
    beside: Sequence[Path] = (),
    note: str = "",
) -> Path:
    """Write a stock LoRA checkpoint; what is there before stays as it is if that fails.

    Modules of rank 0 are left out of the targets: PEFT has no such rank.

    Args:
        made: the checkpoint.
        out: the folder to write.
        engine: who reads it, as in `export_lora`.
        beside: files that are copied next to it, a tokenizer's say.
        note: a sentence for its card on where it comes from.

    Raises:
        ValueError: no module is left, or the engine would compute something else.
        FileExistsError, NotADirectoryError, PermissionError: as in `export_lora`.
    """
    target = check_target(os.fspath(out), "out")
    kept = {module: product for module, product in made.products.items() if product.rank}
    if not kept:
        raise ValueError(f"out={str(out)!r}: no module would be left. Pass a larger rank or budget.")
    if made.config.bias != "none":  # PEFT looks for a module's trained bias where its adapter is
        kept = {module: product if product.rank else product.zeros() for module, product in made.products.items()}
    config = stock_config(made, kept)
    tensors = {_unwrapped(key, made.products.keys() - kept): value for key, value in made.others.items()}
    for module, product in _renamed(kept).items():
        tensors[module + product.ends[0]], tensors[module + product.ends[1]] = product.a, product.b
    ranks = {module: (product.rank, product.alpha) for module, product in kept.items()}
    tensors, config = fit(tensors, config, engine, None, ranks)
    huge = next((key for key, value in tensors.items() if not _is_finite(value)), None)
    if huge is not None:
        raise ValueError(
            f"out={str(out)!r}: {huge} would be too large for {tensors[huge].dtype}. Pass smaller weights, or save the "
            "adapters in float32 or bfloat16."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target if target.is_dir() else target.parent
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{target.name}-") as work:
        folder = Path(work) / target.name
        config.save_pretrained(str(folder), auto_mapping_dict=None if config.task_type else made.config.auto_mapping)
        plain = {key: value.contiguous().clone() for key, value in tensors.items()}  # no tensor twice
        save_file(plain, folder / FILES[1], metadata={"format": "pt"})
        card = write_model_card(folder)
        if note:
            card.write_text(f"{card.read_text(encoding='utf-8').rstrip()}\n\n{note}\n", encoding="utf-8")
        for file in beside:
            shutil.copyfile(file, folder / file.name)
        target.mkdir(exist_ok=True)
        for name in (*(file.name for file in beside), *FILES):
            os.replace(folder / name, target / name)
    return Path(out)


def stock_config(made: LoraCheckpoint, kept: dict[str, Product]) -> LoraConfig:
    """The configuration of a stock LoRA with these of the checkpoint's products."""
    ours = made.config
    settings = {module: (product.rank, product.alpha) for module, product in kept.items()}
    rank, alpha = Counter(settings.values()).most_common(1)[0][0]
    fields = targets_of(kept)
    out = [product.keys[0] for module, product in made.products.items() if module not in kept]
    fields["target_modules"] = only(fields["target_modules"], out)
    if set(kept) == set(made.products):
        fields = {name: copy(getattr(ours, name, None)) for name in fields}
    carried = ("task_type", "fan_in_fan_out", "bias", "modules_to_save", "trainable_token_indices", "revision")
    patterns = [(key, settings[module]) for module, product in kept.items() for key in product.keys]
    return LoraConfig(
        **{name: copy(getattr(ours, name)) for name in carried},
        **fields,
        r=rank,
        lora_alpha=as_whole(alpha),
        rank_pattern={exactly(key): b for key, (b, _) in patterns if b != rank},
        alpha_pattern={exactly(key): as_whole(x) for key, (_, x) in patterns if x != alpha},
        base_model_name_or_path=ours.base_model_name_or_path,
        inference_mode=True,
    )
