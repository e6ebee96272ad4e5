"""The card of an adapter on this machine, with all that lies beside it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft_dynamic.cards import CardFacts, Twin, write_model_card
from peft_dynamic.hosts.saving import after_saving
from peft_dynamic.hub.known import adapter_in, beside, draw, facts_of
from peft_dynamic.hub.twins import Twins, engines_of, source_of, write_twins
from peft_dynamic.ranks import RankCurve


def write_card(
    adapter: str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    license: str | None = None,
    base_model: str | None = None,
    curve: RankCurve | None = None,
    samples: Iterable[str] | bool = True,
) -> tuple[Path, CardFacts]:
    """Write the README.md of a saved adapter as `push_adapter` does, with the curve's picture beside it.

    Args:
        adapter: its folder, or the output of `peft-dynamic train`.
        repo_id: the name to load it by; None for the folder's own name.
        license: as in `push_adapter`.
        base_model: as in `push_adapter`.
        curve: as in `push_adapter`.
        samples: as in `push_adapter`.

    Returns:
        The path of the README.md, and what it says.

    Raises:
        FileNotFoundError: the folder has no adapter.
        ValueError: as in `push_adapter`.
    """
    folder = adapter_in(adapter)
    source = source_of(folder, None, folder)
    found = beside(folder)
    facts = facts_of(source.written, found, curve=curve, samples=samples, license=license, base_model=base_model)
    facts.twins = twins_in(folder)
    if source.is_stock:
        facts.twins.append(Twin(int(source.written["r"]), "", engines_of(folder)))
    facts.picture = draw(curve, found, folder) if facts.rows else None
    return write_model_card(folder, repo_id, facts), facts


def _write_beside(config: Any, folder: Path) -> None:
    """After an adapter with `hub_ranks` was saved: its twins, and the card. The save stands, whatever happens here."""
    if not (folder / "adapter_model.safetensors").is_file():
        return  # the configuration alone, or a pickle
    try:
        with tempfile.TemporaryDirectory(prefix="peft_dynamic-") as work:
            made = Path(work, "made")
            twins = Twins(source_of(folder, None, folder), Path(work, "between"))
            written = write_twins(twins, twins.check(config.hub_ranks, "hub_ranks"), made)
            for path in made.glob("*/README.md"):
                path.unlink()  # which repository they will be in is not known here
            shutil.copytree(made, folder, dirs_exist_ok=True)
        write_model_card(folder, facts=CardFacts(twins=written))
    except (ValueError, OSError, RuntimeError) as error:
        warnings.warn(f"the adapter is saved, and hub_ranks={config.hub_ranks!r} not: {error}", stacklevel=4)


after_saving.append(_write_beside)


def twins_in(folder: Path) -> list[Twin]:
    """The twins in a folder, by rank."""
    found = []
    for path in folder.glob("rank-*/adapter_model.safetensors"):
        name = re.fullmatch(r"rank-(\d+)", path.parent.name)
        if name and (path.parent / "adapter_config.json").is_file():
            found.append(Twin(int(name[1]), path.parent.name, engines_of(path.parent)))
    return sorted(found, key=lambda twin: twin.rank)
