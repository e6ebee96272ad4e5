"""Twins and a card where Trainer pushes by itself: `push_to_hub=True`, with every strategy, and `trainer.push_to_hub`.

Notable: Trainer pushes its output folder whole, folders in it included, and calls `on_push_begin` before each push.
Into that folder it copies, of a checkpoint, an adapter's own files alone; so this is where the twins are put. For
`every_save` the card stays as it is put there. `trainer.push_to_hub()` then writes Trainer's own README over it, after
every callback: the cards in the twins' folders remain, and `push_adapter` or `peft-dynamic card` writes ours again.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from peft_dynamic.hosts.offload import is_sharded
from peft_dynamic.hub.push import CORE, Wanted, ready, write_cards
from peft_dynamic.hub.twins import is_lora


class HubCallback(TrainerCallback):
    """Let every push of a Trainer carry an adapter's plain-LoRA twins and its card.

        trainer = SFTTrainer(model, settings, train_dataset=texts, callbacks=[HubCallback(ranks=[4, 8])])

    with `push_to_hub=True` in `args`. The twins go into folders of the output folder, `rank-4/` and `rank-8/`, at each
    push and only then; checkpoints stay as small as they are. The adapter is the active one, of ours or a stock LoRA,
    as it is in memory, or of a sharded model as it is in the checkpoint. A twin that cannot be made is a warning, and
    never ends a training.

    Args:
        ranks: of the twins; None for a few of the trained ranks, as in `push_adapter`.
        license: of the adapter, for the card.
        base_model: the base model's name on the Hub, where it was loaded from a folder.
    """

    def __init__(
        self, ranks: Sequence[int] | None = None, license: str | None = None, base_model: str | None = None
    ) -> None:
        self.wanted = Wanted(ranks=ranks, license=license, base_model=base_model, samples=False)

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put the twins and the card into the output folder."""
        if not state.is_world_process_zero:
            return
        output = Path(args.output_dir)
        adapter: nn.Module | Path = model
        if any(is_sharded(parameter) for parameter in model.parameters()):
            adapter = output / f"checkpoint-{state.global_step}"
        try:
            self._put(adapter, output, args.hub_model_id or output.absolute().name)
        except (ValueError, OSError, RuntimeError) as error:
            warnings.warn(f"this push has no plain-LoRA twins: {error}", stacklevel=2)

    def _put(self, adapter: nn.Module | Path, output: Path, repo_id: str) -> None:
        with ready(adapter, None, self.wanted) as shared:
            if shared.why_none and is_lora(shared.config):
                warnings.warn(f"this push has no plain-LoRA twins: {shared.why_none}", stacklevel=3)
            there = output / "README.md"
            write_cards(shared, repo_id, there if there.is_file() else None)
            output.mkdir(parents=True, exist_ok=True)
            for stale in (path for path in output.glob("rank-[0-9]*") if (path / CORE[0]).is_file()):
                shutil.rmtree(stale)
            for path in sorted(shared.folder.iterdir()):
                if path.is_dir():
                    shutil.copytree(path, output / path.name, dirs_exist_ok=True)
            shutil.copyfile(shared.folder / "README.md", there)
