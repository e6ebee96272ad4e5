"""A saved adapter and its base model: what is known of it without the model, and both together."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from peft_dynamic.cli import _identity
from peft_dynamic.cli._edge import reason, require_package
from peft_dynamic.cli._given import bad_input, check_adapter, check_model
from peft_dynamic.methods import METHODS, method_of

# An adapter and the tokenizer beside it, and no checkpoints
PATTERNS = ["adapter_config.json", "adapter_model.safetensors", "*token*", "*.jinja", "vocab.*", "merges.txt"]


def adapter_folder(adapter: str) -> Path:
    """The folder of an adapter, fetched where it is a name on the Hub.

    Raises:
        typer.BadParameter: there is none.
    """
    check_adapter(adapter)
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(adapter, allow_patterns=PATTERNS))
    except Exception as error:  # whatever is wrong, the user has to know the name and the reason
        raise typer.BadParameter(
            f"{adapter} is no folder here, and could not be had from the Hub: {reason(error)}", param_hint="ADAPTER"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's configuration as its file has it.

    Raises:
        typer.BadParameter: it is missing or damaged.
    """
    path = folder / "adapter_config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise typer.BadParameter(
            f"{path} cannot be read: {reason(error)}. Save the adapter again, or take another copy.",
            param_hint="ADAPTER",
        ) from error
    return content


def check_product(written: dict[str, Any], adapter: str) -> None:
    """Stop, before anything is imported, where an adapter is no product of factors.

    Args:
        written: the adapter's configuration, as its file has it.
        adapter: what messages call it.
    """
    kind, method = written.get("peft_type"), method_of(written)
    if isinstance(kind, str) and kind != "LORA" and (method is None or not method.engines):
        known = ", ".join(["LORA", *(each.name for each in METHODS.values() if each.engines)])
        raise typer.BadParameter(
            f"{adapter} is a {kind} adapter, which is no product of two factors. There are: {known}.",
            param_hint="ADAPTER",
        )


def largest_rank(written: dict[str, Any]) -> float:
    """The largest rank of a module by an adapter's configuration; infinite where the file alone tells."""
    pattern = written.get("rank_pattern") or {}
    ranks = [written.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    told = written.get("peft_type") != "LORETTA_REP" and all(type(each) is int for each in ranks)
    return max(ranks) if told else math.inf


@dataclass
class Subject:
    """An adapter that was read, and the name of its base model.

    Attributes:
        shown: what messages call it.
        folder: where it is.
        base: the base model.
        read: its products.
        four_bit: whether the base model is quantised.
    """

    shown: str
    folder: Path
    base: str
    read: Any
    four_bit: bool

    @property
    def kind(self) -> str:
        """The adapter's type."""
        kind = self.read.config.peft_type
        return str(getattr(kind, "value", kind))

    @property
    def ranked(self) -> bool:
        """Whether it is run at its ranks as it is; of other methods the product is cut, as a stock LoRA."""
        return self.kind in ("LORA", "DYLORA", "QDYLORA")

    @property
    def largest(self) -> int:
        """The largest rank of a module."""
        return max(product.rank for product in self.read.products.values())

    def identity(self) -> dict[str, Any]:
        """What tells this adapter on this base model from another."""
        seen = hashlib.sha256((self.folder / "adapter_model.safetensors").read_bytes())
        config = read_config(self.folder)
        config.pop("base_model_name_or_path", None)  # it may have moved
        seen.update(json.dumps(config, sort_keys=True).encode())
        return {
            "adapter": {"sha256": seen.hexdigest()[:16]},
            "model": {**_identity.model_files(self.base), "4bit": self.four_bit},
        }

    def load(self, task: Any, dtype: Any, stock: bool) -> tuple[Any, Any]:
        """The adapter on its base model, and the tokenizer.

        Args:
            task: which kind of model it is.
            dtype: the base model's.
            stock: as in `put_on`.

        Raises:
            typer.BadParameter: the adapter is of another base model.
            UserError: something does not load.
        """
        tokenizer = self.tokenizer()
        return self.put_on(self.base_model(task, dtype), stock), tokenizer

    def tokenizer(self) -> Any:
        """That which was saved with the adapter, or else the base model's."""
        from peft_dynamic.cli._load import hush_transformers, load_tokenizer

        hush_transformers()
        own = (self.folder / "tokenizer_config.json").is_file()
        return load_tokenizer(str(self.folder) if own else self.base)

    def base_model(self, task: Any, dtype: Any) -> Any:
        """The base model, for a task and in a dtype."""
        return task.load_base(self.base, dtype, self._quantization(dtype), self.read.others)

    def put_on(self, base: Any, stock: bool) -> Any:
        """The adapter on its base model.

        Args:
            base: the base model.
            stock: as a stock LoRA with the factors that were read, whatever method the adapter is of.
        """
        from peft import PeftModel

        import peft_dynamic.tuners  # noqa: F401  # registers the adapter types
        from peft_dynamic.algebra.checkpoint import write_checkpoint

        with tempfile.TemporaryDirectory() as work:
            folder = write_checkpoint(self.read, Path(work, "lora")) if stock else self.folder
            try:
                model = PeftModel.from_pretrained(base, str(folder))
            except (RuntimeError, ValueError) as error:
                raise self._other_base(_mismatch(error)) from error
        self._check_modules(model)
        return model

    def _quantization(self, dtype: Any) -> dict[str, Any]:
        if not self.four_bit:
            return {}
        from peft_dynamic import QDyLoRAConfig

        return {"quantization_config": QDyLoRAConfig.quantization_config(compute_dtype=dtype)}

    def _check_modules(self, model: Any) -> None:
        """PEFT loads what fits and leaves the rest as it was."""
        there = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
        if missing := sorted(set(self.read.products) ^ there):
            name = missing[0].removeprefix("base_model.model.")
            who, other = ("adapter", "model") if missing[0] in self.read.products else ("model", "adapter")
            raise self._other_base(f"{len(missing)} modules are in the {who} alone and not in the {other}, as {name}")

    def _other_base(self, why: str) -> Exception:
        return typer.BadParameter(
            f"{self.shown} does not fit {self.base}: {why.rstrip('.')}. Pass the base model that it was trained on.",
            param_hint="--model",
        )


def _mismatch(error: Exception) -> str:
    """Of torch's list of tensors that do not fit the first one, in a sentence; else what was raised."""
    found = re.search(r"size mismatch for (\S+): .*?(\[[\d, ]*\]).*?(\[[\d, ]*\])", str(error))
    if found is None:
        return reason(error)
    name, saved, there = found.groups()
    return f"{name.removeprefix('base_model.model.')} is {saved} in the adapter, and the model has room for {there}"


def subject(adapter: str, folder: Path, model: str | None, four_bit: bool, loads: bool = True) -> Subject:
    """Read an adapter, with its tensors.

    Args:
        adapter: what messages call it.
        folder: where it is.
        model: the base model; None for the one that the adapter names.
        four_bit: whether the base model is to be quantised.
        loads: whether the base model is going to be loaded, so that it has to be there.

    Raises:
        typer.BadParameter: it is no product of factors or damaged, or its base model is not there.
    """
    import peft_dynamic.tuners  # noqa: F401  # registers the adapter types
    from peft_dynamic.algebra.checkpoint import read_checkpoint

    with bad_input("ADAPTER"):
        read = read_checkpoint(folder)
    base = model or read.config.base_model_name_or_path or ""
    if loads:
        base = _base(adapter, base, model)
    kind = str(getattr(read.config.peft_type, "value", read.config.peft_type))
    four_bit = four_bit or kind == "QDYLORA"
    if four_bit and loads:
        require_package("bitsandbytes", "--4bit" if kind != "QDYLORA" else "a QDyLoRA adapter", "quant")
    return Subject(adapter, folder, base, read, four_bit)


def _base(adapter: str, base: str, model: str | None) -> str:
    if not base:
        raise typer.BadParameter(f"missing. {adapter} does not say its base model.", param_hint="--model")
    if model is None and base.startswith((".", "/", "~")) and not Path(base).expanduser().is_dir():
        raise typer.BadParameter(
            f"missing. {adapter} names {base} as its base model, which is not there; pass where it is.",
            param_hint="--model",
        )
    return check_model(base)
