"""What a finished LoRA adapter holds: its kind, its size, and how much of its update each rank keeps."""

from __future__ import annotations

from rich.table import Table

from peft_dynamic.algebra.checkpoint import LoraCheckpoint
from peft_dynamic.algebra.resize import spectra
from peft_dynamic.export import PEFT_PREFIX
from peft_dynamic.reports.curve import as_text


def energy_kept(read: LoraCheckpoint) -> dict[str, list[float]]:
    """Module -> the share of the squared singular values that the ranks 1, 2, ... keep, from 0 to 1.

    Of a convolution in n groups the ranks are n, 2 n, ...
    """
    kept = {}
    for module, values in spectra(read).items():
        squares = [value**2 for value in values]
        total = sum(squares) or 1.0
        kept[module] = [sum(squares[: rank + 1]) / total for rank in range(len(squares))]
    return kept


def energy_table(read: LoraCheckpoint, width: int = 100) -> str:
    """The adapter in a line, and a table of the energy that powers of two of the rank keep, by module.

    Args:
        read: the adapter.
        width: of the table.
    """
    most = max(product.rank for product in read.products.values())
    ranks = [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
    size = sum(p.a.element_size() * p.size for p in read.products.values())
    kind = getattr(read.config.peft_type, "value", read.config.peft_type)
    about = f"{kind}, {len(read.products)} modules, largest rank {most}, {read.size:,} numbers, {size / 2**20:.1f} MiB"
    if read.others:
        about += f", and {len(read.others)} other tensors"
    table = Table("module", "rank", *(f"{rank}" for rank in ranks), title="energy of the update kept at a rank")
    for module, kept in energy_kept(read).items():
        product = read.products[module]
        steps = [rank // product.groups if rank <= product.rank else 0 for rank in ranks]
        shares = [f"{kept[step - 1]:.1%}" if step else "" for step in steps]
        table.add_row(module.removeprefix(PEFT_PREFIX), str(product.rank), *shares)
    return f"{about}\n{as_text(table, width)}"
