"""What a finished LoRA adapter holds: its kind, its size, and how much of its update each rank keeps."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from peft_dynamic.algebra.checkpoint import LoraCheckpoint
from peft_dynamic.algebra.resize import spectra
from peft_dynamic.export import PEFT_PREFIX
from peft_dynamic.functional.ranks import usual_ranks
from peft_dynamic.reports.curve import as_text, new_figure, picture_path, plain_axis, save_figure

# What nearly all of the energy is, in the sentence and in the picture
NEARLY_ALL = 0.99


def energy_kept(read: LoraCheckpoint) -> dict[str, list[float]]:
    """Module -> the share of the squared singular values that the ranks 1, 2, ... keep, from 0 to 1.

    An update that is 0 has nothing to lose: every rank keeps all of it. Of a convolution in n groups the ranks are n,
    2 n, ...
    """
    kept = {}
    for module, values in spectra(read).items():
        sums = list(accumulate(value**2 for value in values))
        kept[module] = [part / sums[-1] if sums[-1] else 1.0 for part in sums]
    return kept


def _by_rank(read: LoraCheckpoint) -> dict[str, list[float]]:
    """The same with a value for every rank, 0 where the groups of a convolution have none."""
    found = {}
    for module, kept in energy_kept(read).items():
        product = read.products[module]
        steps = [rank // product.groups for rank in range(1, product.rank + 1)]
        found[module] = [kept[step - 1] if step else 0.0 for step in steps]
    return found


def rank_for(kept: dict[str, list[float]], share: float = NEARLY_ALL) -> int:
    """The smallest rank at which every module keeps this share of its energy.

    Args:
        kept: module -> the share that the ranks 1, 2, ... keep.
        share: from 0 to 1.
    """
    return max(_first(shares, share) for shares in kept.values())


def summary(read: LoraCheckpoint) -> dict[str, Any]:
    """The adapter's type, sizes, ranks and energy as plain numbers, to be written as JSON."""
    kept = _by_rank(read)
    return {
        "adapter": read.name,
        "type": _kind(read),
        "base_model": read.config.base_model_name_or_path,
        "largest_rank": _largest(read),
        "numbers": read.size,
        "bytes": _bytes(read),
        "other_tensors": len(read.others),
        "rank_for_energy": {"share": NEARLY_ALL, "rank": rank_for(kept)},
        "modules": {
            module.removeprefix(PEFT_PREFIX): {
                "rank": product.rank,
                "numbers": product.size,
                "energy_kept": kept[module],
            }
            for module, product in ((name, read.products[name]) for name in in_order(list(read.products)))
        },
    }


def energy_table(read: LoraCheckpoint, width: int = 100) -> str:
    """The adapter in a line, a table of the energy that powers of two of the rank keep, and the rank that keeps 99 %.

    Args:
        read: the adapter.
        width: of the table.
    """
    most = _largest(read)
    about = (
        f"{_kind(read)}, {len(read.products)} modules, largest rank {most}, {read.size:,} numbers, "
        f"{_bytes(read) / 2**20:.1f} MiB"
    )
    if read.others:
        about += f", and {len(read.others)} other tensors"
    ranks = usual_ranks(most)
    table = Table("module", "rank", *map(str, ranks), title="energy of the update kept at a rank")
    for column in table.columns[1:]:
        column.justify = "right"
    kept = _by_rank(read)
    for module in in_order(list(kept)):
        shares = kept[module]
        there = [rank <= len(shares) and rank >= read.products[module].groups for rank in ranks]
        cells = [f"{shares[rank - 1]:.1%}" if has else "" for rank, has in zip(ranks, there, strict=True)]
        table.add_row(module.removeprefix(PEFT_PREFIX), str(len(shares)), *cells)
    if len(kept) > 2:
        table.add_section()
        for name, choose in (("median of all", median), ("lowest of all", min)):
            table.add_row(name, "", *(f"{choose(_all_at(kept, rank)):.1%}" for rank in ranks))
    return f"{about}\n{as_text(table, width)}{rank_sentence(kept)}"


def in_order(modules: list[str]) -> list[str]:
    """The modules by their kind, and of a kind by the numbers in their names: layer 2 before layer 10."""
    kinds = _kinds(modules)
    return sorted(modules, key=lambda module: (kinds[module], _numbered(module), module))


def _numbered(module: str) -> list[int]:
    return [int(part) for part in module.split(".") if part.isdigit()]


def rank_sentence(kept: dict[str, list[float]]) -> str:
    """Which rank keeps nearly all of every module's energy, and which module needs it."""
    rank, worst = rank_for(kept), _worst(kept).removeprefix(PEFT_PREFIX)
    what = f"{NEARLY_ALL:.0%} of the energy in every module"
    if rank == max(map(len, kept.values())):
        return f"No rank below {rank}, the largest, keeps {what}: {worst} needs all of it."
    return f"Rank {rank} keeps {what}; {worst} needs the most."


def energy_plot(read: LoraCheckpoint, path: str | Path, title: str | None = None) -> Path:
    """Draw the energy kept against the rank: a thin line for each module, medians, and the module that needs the most.

    Args:
        read: the adapter.
        path: where to write; ".png", ".svg" and ".pdf" say the format. Missing folders are made.
        title: a line above the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: another suffix.
    """
    path = picture_path(path)
    kept = _by_rank(read)
    ranks = usual_ranks(_largest(read))
    figure = new_figure("energy", 7.5, 4.8)
    axis = figure.subplots()
    _draw(axis, kept, range(1, _largest(read) + 1))
    _mark(axis, rank_for(kept), ranks[-1])
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, labels=list(map(str, ranks)))
    axis.minorticks_off()
    axis.set_ylim(0, 1.03)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("rank")
    axis.set_ylabel("energy of the update kept")
    plain_axis(axis)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return save_figure(figure, path, title)


def _draw(axis: Any, kept: dict[str, list[float]], ranks: range) -> None:
    """A thin line for each module, a line for the median of each kind, and those that are named."""
    kinds = _kinds(list(kept))
    for i, (kind, count) in enumerate(Counter(kinds.values()).items()):
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
        same = {module: shares for module, shares in kept.items() if kinds[module] == kind}
        for shares in same.values():
            axis.plot(range(1, len(shares) + 1), shares, **style, linewidth=0.6, alpha=0.3)
        label = f"{kind}, median of {count}" if count > 1 else kind
        axis.plot(ranks, [median(_all_at(same, rank)) for rank in ranks], **style, linewidth=1.6, label=label)
    axis.plot(ranks, [median(_all_at(kept, rank)) for rank in ranks], color="0", linewidth=2.4, label="median of all")
    worst = _worst(kept)
    label = f"needs the most:\n{worst.removeprefix(PEFT_PREFIX)}"
    axis.plot(range(1, len(kept[worst]) + 1), kept[worst], color="0", linewidth=1.5, linestyle="--", label=label)


def _mark(axis: Any, rank: int, most: int) -> None:
    """The rank at which every module is above the line of nearly all."""
    axis.axhline(NEARLY_ALL, color="0.45", linewidth=0.8, linestyle=":")
    axis.axvline(rank, color="0.45", linewidth=0.8, linestyle=":")
    axis.annotate(
        f"rank {rank}: {NEARLY_ALL:.0%} in every module",
        (rank, 0),
        (-4 if rank * rank > most else 4, 6),
        textcoords="offset points",
        ha="right" if rank * rank > most else "left",
        fontsize="small",
    )


def _kinds(modules: list[str]) -> dict[str, str]:
    """Module -> what it is in its layer: the last part of its name, and more of it where that is said of two things."""
    tails = {}
    for module in modules:
        parts = module.removeprefix(PEFT_PREFIX).split(".")
        after = max((i + 1 for i, part in enumerate(parts[:-1]) if part.isdigit()), default=0)
        tails[module] = ".".join(parts[after:])
    lasts = Counter(tail.rpartition(".")[2] for tail in set(tails.values()))
    return {
        module: tail if lasts[tail.rpartition(".")[2]] > 1 else tail.rpartition(".")[2]
        for module, tail in tails.items()
    }


def _first(shares: list[float], share: float) -> int:
    return next(rank for rank, part in enumerate(shares, start=1) if part >= share)


def _worst(kept: dict[str, list[float]]) -> str:
    """The module that needs the largest rank for nearly all of its energy; of several the one that keeps least."""
    return max(kept, key=lambda module: (_first(kept[module], NEARLY_ALL), -sum(kept[module]) / len(kept[module])))


def _all_at(kept: dict[str, list[float]], rank: int) -> list[float]:
    return [shares[min(rank, len(shares)) - 1] for shares in kept.values()]


def _largest(read: LoraCheckpoint) -> int:
    return max(product.rank for product in read.products.values())


def _kind(read: LoraCheckpoint) -> str:
    return str(getattr(read.config.peft_type, "value", read.config.peft_type))


def _bytes(read: LoraCheckpoint) -> int:
    return sum(p.a.element_size() * p.size for p in read.products.values())
