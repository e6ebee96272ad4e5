"""What `peft-dynamic compare` does once its arguments are right: one base model after the other, and the table."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.table import Table as Columns

from peft_dynamic.cards.text import inline
from peft_dynamic.cards.text import table as as_markdown
from peft_dynamic.cli import _identity, _load, _paired
from peft_dynamic.cli._answer import in_json
from peft_dynamic.cli._budget import Budget
from peft_dynamic.cli._contender import Contender
from peft_dynamic.cli._given import bad_input
from peft_dynamic.cli._memory import watched
from peft_dynamic.cli._paired import Examples
from peft_dynamic.cli._subject import Subject, subject
from peft_dynamic.cli._task import LabelTask, TextTask
from peft_dynamic.hosts.modes import adapters_disabled, evaluating
from peft_dynamic.ranks import rank_curve
from peft_dynamic.reports.curve import aligned, as_text


@dataclass
class Comparing:
    """One call, checked as far as the adapters' numbers do not come in."""

    listed: list[Contender]
    folders: dict[str, Path]
    task: TextTask | LabelTask
    model: str | None
    four_bit: bool
    minutes: float | None
    metric: str | None
    started: float  # by time.monotonic
    out: Path | None = None  # .json or .md


@dataclass
class Entry:
    """One of those that are compared, on one base model, and what was found of it."""

    name: str
    subject: Subject
    contender: Contender
    scores: list[Any] | None = None
    whole: list[bool] | None = None
    parameters: int = 0
    bytes: int = 0
    seconds: float = 0.0
    memory: int | None = None


def run(job: Comparing) -> dict[str, Any]:
    """Measure all of them, and show the table; the same as an answer for other programs."""
    subjects = {name: subject(name, folder, job.model, job.four_bit) for name, folder in job.folders.items()}
    entries = _entries(job, subjects)
    if job.task.unused:
        typer.echo(f"Columns that are not read: {', '.join(job.task.unused)}.")
    budget, dtype = Budget(job.minutes, job.started), _load.fast_dtype()
    expected = 0.0
    for entry, ready in _loaded(entries, job.task, dtype):
        model, tokenizer = ready
        read = _paired.examples(job.task, model, tokenizer)
        if budget.limited:
            expected = max(expected, _expected(model, job.task, read, dtype))
        if expected > budget.left():
            left = f"{max(0.0, budget.left()):.0f} s are left"
            typer.echo(f"--minutes {job.minutes:g}: the next takes about {expected:.0f} s, and {left}.")
            break
        begun = time.monotonic()
        _measure(entry, model, job.task, read, dtype)
        expected = time.monotonic() - begun
        typer.echo(f"{entry.name}: measured in {entry.seconds:.1f} s")
    return _shown(job, entries)


def _entries(job: Comparing, subjects: dict[str, Subject]) -> list[Entry]:
    """In the given order; the word `base` stands for each base model that there is."""
    bases: dict[str, Subject] = {}
    for of in subjects.values():
        bases.setdefault(_base_of(of), of)
    found: list[Entry] = []
    for each in job.listed:
        if each.adapter is not None:
            found.append(Entry(each.word, subjects[each.adapter], each))
            continue
        for of in bases.values():
            found.append(Entry(f"base {of.base}" if len(bases) > 1 else "base", of, each))
    for entry in found:
        bias = getattr(entry.subject.read.config, "bias", "none")
        if entry.contender.adapter is None and bias != "none":
            raise typer.BadParameter(
                f"base: {entry.subject.shown} trained its biases, which cannot be switched off. Leave base out.",
                param_hint="ADAPTERS",
            )
    return found


def _base_of(of: Subject) -> str:
    return str({**_identity.model_files(of.base), "4bit": of.four_bit})


def _loaded(entries: list[Entry], task: Any, dtype: torch.dtype) -> Iterator[tuple[Entry, tuple[Any, Any]]]:
    """Each with its model and tokenizer, those of one base model together.

    A base model is loaded once for all adapters that are factors alone. What another adapter brings beside them, a
    classifier's head say, stays in the model, which is loaded anew for the next.
    """
    base, at, on = None, "", None  # the base model without an adapter, which it is, and whose adapter is on it
    model: Any = None
    order: dict[str, int] = {}  # base models and adapters as they come: what the others are compared with is first
    for entry in entries:
        for name in (_base_of(entry.subject), entry.subject.shown):
            order.setdefault(name, len(order))
    for entry in sorted(entries, key=lambda each: (order[_base_of(each.subject)], order[each.subject.shown])):
        of = entry.subject
        if on is not of:
            clean = model is not None and on is not None and not on.read.others and not of.read.others
            base = model.unload() if clean and at == _base_of(of) else None
            model = None  # before the next one is loaded: two may not fit
            base = of.base_model(task, dtype) if base is None else base
            tokenizer = of.tokenizer()
            model, at, on, base = of.put_on(base, stock=not of.ranked), _base_of(of), of, None
        yield entry, (model, tokenizer)


def _expected(model: Any, task: Any, read: Examples, dtype: torch.dtype) -> float:
    """Seconds for all rows, by those of the first batch; the first of two calls sets things up."""
    tokens = [batch["input_ids"].numel() for _, batch in read.batches]
    first, begun = Examples(read.batches[:1], read.owner, read.whole), 0.0
    for _ in range(2):
        begun = time.monotonic()
        with evaluating(model):
            _paired.scored(model, task, first, dtype)
    return (time.monotonic() - begun) * sum(tokens) / tokens[0]


def _measure(entry: Entry, model: Any, task: Any, read: Examples, dtype: torch.dtype) -> None:
    of, at = entry.subject, entry.contender.at

    def evaluate(model: Any) -> dict[str, float]:
        begun = time.monotonic()
        with watched() as peak:
            entry.scores = _paired.scored(model, task, read, dtype)
        entry.seconds, entry.memory = time.monotonic() - begun, peak.bytes
        return {"done": 1.0}

    entry.whole = read.whole
    others = sum(value.numel() * value.element_size() for value in of.read.others.values())
    width = next(iter(of.read.products.values())).a.element_size()
    if entry.contender.adapter is None:
        with evaluating(model), adapters_disabled(model):
            evaluate(model)
    elif at is None:
        with evaluating(model):
            evaluate(model)
        entry.parameters = of.read.size
        entry.bytes = (of.folder / "adapter_model.safetensors").stat().st_size
    else:
        ranks = [] if at.rank is None else [at.rank]
        budgets = [] if at.budget is None else [at.budget]
        with bad_input("ADAPTERS"):
            row = rank_curve(model, evaluate, ranks, base=False, progress=False, budgets=budgets).rows[0]
        entry.parameters = row.parameters or 0
        entry.bytes = entry.parameters * width + others


def _shown(job: Comparing, entries: list[Entry]) -> dict[str, Any]:
    """The table, of those that were measured."""
    done = [entry for entry in entries if entry.scores is not None]
    missing = [entry.name for entry in entries if entry.scores is None]
    answer: dict[str, Any] = {
        "data": job.task.given.data,
        "metric": None,
        "rows": 0,
        "compared": [],
        "missing": missing,
    }
    cells: list[list[str]] = []
    notes: list[str] = []
    if done:
        table = _paired.table([each.scores or [] for each in done], [each.whole or [] for each in done], job.metric)
        if not table.used:
            raise typer.BadParameter(
                "no row fits into --max-length for all of them. Raise it, or shorten the rows.", param_hint="--data"
            )
        if table.metric not in table.values[0]:
            raise typer.BadParameter(
                f"{table.metric} was not measured; there are {', '.join(table.values[0])}.", param_hint="--metric"
            )
        answer |= {"metric": table.metric, "rows": table.used}
        answer["compared"] = [_row(entry, table, values) for entry, values in zip(done, table.values, strict=True)]
        cells = _cells(answer["compared"], table)
        typer.echo(_text(cells), nl=False)
        if not table.alike:
            notes.append(
                "Their tokenizers cut the rows differently, so that a token's loss means something else in each: the "
                "loss of a whole row is compared."
            )
        notes.append(
            f"Over {table.used} rows of {job.task.given.data}. In brackets: 95 % of a bootstrap over the rows."
        )
    if missing:
        notes.append(f"Missing: {', '.join(missing)}. Pass more --minutes, or fewer --rows.")
    typer.echo("\n".join(notes))
    if job.out is not None:
        _write(job.out, answer, cells, notes)
    return answer


def _row(entry: Entry, table: _paired.Table, values: dict[str, Any]) -> dict[str, Any]:
    first, own = table.values[0][table.metric], values[table.metric]
    found = None if values is table.values[0] else _paired.interval(own, first)
    return {
        "name": entry.name,
        "base_model": entry.subject.base,
        "metrics": {name: _paired.mean(value) for name, value in values.items()},
        "difference": None if values is table.values[0] else _paired.mean(own) - _paired.mean(first),
        "interval": None if found is None else list(found),
        "parameters": entry.parameters,
        "bytes": entry.bytes,
        "seconds": round(entry.seconds, 3),
        "memory": entry.memory,
    }


def _cells(rows: list[dict[str, Any]], table: _paired.Table) -> list[list[str]]:
    """The rows as a table, its head first."""
    scores = aligned([row["metrics"][table.metric] for row in rows])
    ends = [value for row in rows for value in (row["difference"], *(row["interval"] or ())) if value is not None]
    shown = iter(aligned(ends, signed=True))
    cells = [["", table.metric, "beside the first", "parameters", "bytes", "seconds", "memory"]]
    for row, score in zip(rows, scores, strict=True):
        beside = "" if row["difference"] is None else next(shown)
        if row["interval"] is not None:
            beside += f" [{next(shown)}, {next(shown)}]{_verdict(row['interval'], table.metric)}"
        memory = "" if row["memory"] is None else f"{row['memory'] / 2**20:,.0f} MiB"
        sizes = (f"{row['parameters']:,}", f"{row['bytes']:,}", f"{row['seconds']:.2f}", memory)
        cells.append([row["name"], score, beside, *sizes])
    return cells


def _text(cells: list[list[str]]) -> str:
    """The table for a terminal."""
    columns = Columns(*cells[0])
    for column in columns.columns[1:]:
        column.justify = "right"
    for row in cells[1:]:
        columns.add_row(*row)
    return as_text(columns, width=160)


def _write(out: Path, answer: dict[str, Any], cells: list[list[str]], notes: list[str]) -> None:
    """The table in a file, whole or not at all."""
    text = in_json(answer)
    if out.suffix == ".md":
        shown = [[inline(cell) for cell in row] for row in cells]
        parts = [as_markdown(shown[0], shown[1:])] if shown else []
        text = "\n\n".join([*parts, *map(inline, notes)])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        made = Path(work, out.name)
        made.write_text(f"{text}\n", encoding="utf-8")
        made.replace(out)
    typer.echo(f"The table is in {out}.")


def _verdict(found: list[float], metric: str) -> str:
    """A word where the interval leaves 0 out."""
    up = _paired.better(metric)
    if found[0] <= 0 <= found[1] or up is None:
        return ""
    return " better" if (found[0] > 0) == up else " worse"
