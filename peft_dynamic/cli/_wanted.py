"""One call of `peft-dynamic export`, its arguments checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Wanted:
    """What is to be written.

    Attributes:
        adapter: what messages call it.
        folder: where the adapter is, or the model.
        written: the adapter's configuration as its file has it; empty for a model.
        out: the folder to write; None for a GGUF file alone.
        rank: of a DyLoRA adapter.
        model: the base model that was given; None for the one that the adapter names.
        merge: whether the result is a whole model.
        depth: how many layers it has; None for all.
        gguf: the GGUF file to write.
        llama_cpp: a checkout of llama.cpp.
        engine: who reads the LoRA.
        dry_run: whether nothing is to be written.
    """

    adapter: str
    folder: Path
    written: dict[str, Any]
    out: Path | None
    rank: int | None
    model: str | None
    merge: bool
    depth: int | None
    gguf: Path | None
    llama_cpp: Path | None
    engine: str
    dry_run: bool

    @property
    def kind(self) -> str:
        """The adapter's type; empty for a model."""
        return str(self.written.get("peft_type", ""))

    @property
    def title(self) -> str:
        """What is written, in a sentence."""
        what = f"Rank {self.rank} of {self.adapter}" if self.rank else self.adapter
        return f"{what} at depth {self.depth}" if self.depth else what
