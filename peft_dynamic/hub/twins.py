"""Plain-LoRA twins: an adapter's ranks as stock LoRA adapters, in folders that stock PEFT loads by `subfolder=`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

import peft_dynamic.tuners  # noqa: F401  # registers the adapter types
from peft_dynamic.algebra import resize_adapter
from peft_dynamic.algebra.stock import is_ranked, write_rank
from peft_dynamic.cards import Twin
from peft_dynamic.engines import fit
from peft_dynamic.export import FILES, export_lora
from peft_dynamic.functional.ranks import usual_ranks
from peft_dynamic.methods import method_of
from peft_dynamic.rules import is_int

MOST = 4  # twins, where nobody says how many: with a rank, its half, and so on they are less than twice the largest
ENGINES = ("vllm", "llama.cpp")


def folder_of(rank: int) -> str:
    """The folder of a twin."""
    return f"rank-{rank}"


def is_lora(written: Mapping[str, Any]) -> bool:
    """Whether an adapter is a LoRA, or one of our methods that has a form as one."""
    method = method_of(written)
    return written["peft_type"] == "LORA" if method is None else bool(method.engines)


@dataclass
class Source:
    """An adapter that is shared.

    Attributes:
        folder: where it is saved.
        shown: what messages call it.
        model: it, loaded; None where there is only the folder.
        name: its name in the model.
    """

    folder: Path
    shown: str
    model: Any = None
    name: str | None = None

    @property
    def written(self) -> dict[str, Any]:
        """Its configuration, as the file has it."""
        found: dict[str, Any] = json.loads((self.folder / "adapter_config.json").read_text(encoding="utf-8"))
        return found

    @property
    def is_stock(self) -> bool:
        """Whether it is a stock LoRA itself."""
        return self.written["peft_type"] == "LORA"

    def why_none(self) -> str:
        """Why it has no form as a LoRA; empty where it has."""
        if is_lora(self.written):
            return ""
        method = method_of(self.written)
        if method is None:
            return f"a {self.written['peft_type']} adapter is no LoRA"
        return f"{method.title} is made of {method.not_lora}"

    def check_loads(self) -> None:
        """Raise ValueError for a configuration that makes no adapter."""
        try:
            PeftConfig.from_pretrained(str(self.folder))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{self.shown}: adapter_config.json does not make a configuration ({error}).") from error


def source_of(adapter: nn.Module | str | os.PathLike[str], adapter_name: str | None, work: Path) -> Source:
    """What is to be shared: a saved adapter, or one of a model, which is saved into `work`.

    Raises:
        FileNotFoundError: the folder has no adapter.
        ValueError: the model has no such adapter.
    """
    if isinstance(adapter, nn.Module):
        model: Any = getattr(adapter, "_orig_mod", adapter)  # torch.compile's wrapper
        name = _adapter_of(model, adapter_name)
        return Source(_save(model, work, name), f"the adapter {name!r}", model, name)
    folder = Path(adapter).expanduser()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"model={os.fspath(adapter)!r} has no {file}. Pass a PeftModel, or a folder that save_pretrained wrote."
            )
    if adapter_name is not None:
        raise ValueError(f"adapter_name={adapter_name!r} is of a model, and a folder has one adapter. Leave it out.")
    source = Source(folder, f"model={os.fspath(adapter)!r}")
    source.check_loads()
    return source


def _adapter_of(model: Any, adapter_name: str | None) -> str:
    """The named adapter, or the first active one: of ours, or a stock LoRA."""
    configs = getattr(model, "peft_config", {})
    known = sorted(name for name, each in configs.items() if method_of(each) is not None or each.peft_type == "LORA")
    if not known:
        raise ValueError("the model has no adapter of peft_dynamic, and no LoRA. For others use PEFT's push_to_hub.")
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    active = [name for name in layer.active_adapters if name in known]
    name = adapter_name if adapter_name is not None else next(iter(active), None)
    if name is None or name not in known:
        raise ValueError(
            f"adapter_name={name!r} is no adapter of peft_dynamic in the model, and no LoRA. Pass one of {known}."
        )
    return str(name)


def _save(model: Any, work: Path, name: str) -> Path:
    if isinstance(model, PeftModel):
        model.save_pretrained(str(work), selected_adapters=[name])
        return work if name == "default" else work / name
    if model.active_adapters() != [name]:  # transformers saves the active adapter only
        raise ValueError(
            f"adapter_name={name!r} is not the one active adapter: call model.set_adapter({name!r}) first."
        )
    model.save_pretrained(work)
    path = work / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if not config.get("task_type") and not config.get("auto_mapping"):  # PeftModel notes the class, transformers not
        config["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return work


class Twins:
    """The stock LoRAs that an adapter can be had as.

    Args:
        source: the adapter.
        work: an empty folder for what is made on the way.

    Raises:
        ValueError: the adapter has no form as a LoRA.
    """

    def __init__(self, source: Source, work: Path) -> None:
        if why := source.why_none():
            raise ValueError(f"{source.shown} has no plain-LoRA twins: {why}.")
        self.source = source
        self.ranked = is_ranked(source.written)
        self.stock = source.folder
        if not self.ranked and not source.is_stock:
            self.stock = work / "stock"
            if source.model is not None:
                export_lora(source.model, self.stock, adapter_name=source.name)
            else:
                resize_adapter(source.folder, self.stock, rank=_largest(source.folder))
        self.largest = int(source.written["r"]) if self.ranked else _largest(self.stock)

    def usual(self) -> list[int]:
        """A few of the trained ranks: the largest, its half, and so on; of a stock LoRA those below its own."""
        trained = usual_ranks(self.largest)
        if self.ranked:
            trained = self.source.written.get("ranks") or [*range(1, self.largest + 1)]
        few: list[int] = []
        below = self.largest // 2 if self.source.is_stock else self.largest
        for rank in sorted(trained, reverse=True):
            if rank <= below and len(few) < MOST:
                few.append(rank)
                below = rank // 2
        return sorted(few)

    def check(self, ranks: Iterable[Any], name: str) -> list[int]:
        """The ranks, increasing.

        Raises:
            ValueError: the adapter has no such rank.
        """
        found = list(ranks)
        for rank in found:
            if not is_int(rank) or not 1 <= rank <= self.largest:
                raise ValueError(
                    f"{name}={rank!r}: must be a whole number from 1 to {self.largest}, the adapter's largest rank."
                )
        return sorted({int(rank) for rank in found})

    def write(self, rank: int, out: Path) -> None:
        """Write the stock LoRA of a rank: what `export_lora` gives, or of an adapter with one rank a cut of it."""
        source = self.source
        if self.ranked and source.model is not None:
            export_lora(source.model, out, rank=rank, adapter_name=source.name)
        elif self.ranked:
            write_rank(source.folder, out, rank)
        elif rank == self.largest:
            out.mkdir(parents=True)
            for file in FILES[1:]:
                shutil.copyfile(self.stock / file, out / file)
        else:
            resize_adapter(self.stock, out, rank=rank)


def _largest(folder: Path) -> int:
    """The largest rank of a module, by the configuration."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    patterns = config.get("rank_pattern") or {}
    return max(int(config["r"]), *(int(rank) for rank in patterns.values())) if patterns else int(config["r"])


def engines_of(folder: Path) -> tuple[str, ...]:
    """The programs beside PEFT that read a stock LoRA as it is."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    found = []
    for engine in ENGINES:
        try:
            fit(tensors, config, engine, False, {})
        except ValueError:
            continue
        if not config.rank_pattern and not config.alpha_pattern:
            found.append(engine)
    return tuple(found)


def write_twins(twins: Twins, ranks: Sequence[int], into: Path) -> list[Twin]:
    """Write each rank into its folder under `into`."""
    made = []
    for rank in ranks:
        twins.write(rank, into / folder_of(rank))
        made.append(Twin(rank, folder_of(rank), engines_of(into / folder_of(rank))))
    return made
