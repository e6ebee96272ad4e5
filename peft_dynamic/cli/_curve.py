"""What `peft-dynamic measure` does once its arguments are right: the missing rows, as long as there is time."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from peft_dynamic.cli import _load, _moments
from peft_dynamic.cli._budget import Budget
from peft_dynamic.cli._choice import choice
from peft_dynamic.cli._given import bad_input, command_line, require
from peft_dynamic.cli._interrupt import Interrupted
from peft_dynamic.cli._record import Record, Setting
from peft_dynamic.cli._subject import Subject
from peft_dynamic.cli._task import Evaluate, LabelTask, TextTask
from peft_dynamic.functional.ranks import usual_ranks
from peft_dynamic.hosts.modes import adapters_disabled, evaluating
from peft_dynamic.ranks import RankRow, rank_curve
from peft_dynamic.reports.curve import measured_samples, number


@dataclass
class Curving:
    """One call, checked as far as the adapter's numbers do not come in."""

    subject: Subject
    task: TextTask | LabelTask
    ranks: list[int] | None
    budgets: list[int | float]
    out: Path | None
    plot: Path | None
    minutes: float | None
    metric: str | None
    tolerance: float
    started: float  # by time.monotonic
    moments: Path | None = None


def run(job: Curving) -> dict[str, Any]:
    """Measure what the file has not, and show all of it; the same as an answer for other programs."""
    wanted = _wanted(job)
    about = {**job.subject.identity(), "data": job.task.identity(), "dtype": None}
    if job.moments is not None:
        about["moments"] = hashlib.sha256(job.moments.read_bytes()).hexdigest()[:16]
    record = Record(job.out, about)
    if changed := record.go_on():
        typer.echo(f"Gone on with other versions: {'; '.join(changed)}.")
    missing = [setting for setting in wanted if setting not in record.rows]
    if record.rows:
        typer.echo(f"{job.out} has {len(wanted) - len(missing)} of {len(wanted)} rows already.")
    if missing:
        record.about["dtype"] = record.about["dtype"] or str(_load.fast_dtype()).removeprefix("torch.")
        _Measuring(job, record).all(missing)
    missing = [setting for setting in wanted if setting not in record.rows]
    chosen = _show(job, record, not missing)
    if missing:
        kept = f"Go on with: {command_line()}" if job.out else "Pass --out to keep the rows and go on another time."
        typer.echo(f"Missing: {', '.join(map(str, missing))}. {kept}")
    rows = [
        {"setting": str(at), **_numbers(row), "seconds": record.seconds.get(str(at))}
        for at, row in sorted(record.rows.items(), key=lambda pair: pair[0].order)
    ]
    about = {"adapter": job.subject.shown, "base_model": job.subject.base, "data": job.task.given.data}
    return {**about, "rows": rows, "missing": list(map(str, missing)), **chosen}


def _numbers(row: RankRow) -> dict[str, Any]:
    """A row without the values of its examples, which are in the file of --out."""
    found = {"rank": row.rank, "budget": row.budget, "parameters": row.parameters, "metrics": row.metrics}
    return {name: value for name, value in found.items() if value is not None}


def _wanted(job: Curving) -> list[Setting]:
    """The rows that were asked for, in the order in which they are measured."""
    read, most = job.subject.read, job.subject.largest
    ranks = job.ranks
    if ranks is None:
        ranks = [] if job.budgets else list(getattr(read.config, "trained_ranks", None) or usual_ranks(most))
    above = [rank for rank in ranks if rank > most]
    require(not above, "--ranks", ",".join(map(str, above)), f"at most {most}, the largest rank of {job.subject.shown}")
    beyond = [budget for budget in job.budgets if budget > read.size]
    require(not beyond, "--budgets", ",".join(map(str, beyond)), f"at most {read.size}, the numbers of the adapter")
    wanted = {Setting(rank=rank) for rank in ranks} | {Setting(budget=budget) for budget in job.budgets}
    if getattr(read.config, "bias", "none") == "none":
        wanted.add(Setting())
    else:
        typer.echo("No row for the base model: the adapter trained its biases, which cannot be switched off.")
    return sorted(wanted, key=lambda at: at.order)


class _Measuring:
    """The adapter on its base model, and the rows to measure it on."""

    def __init__(self, job: Curving, record: Record) -> None:
        self.job, self.record = job, record
        self.budget = Budget(job.minutes, job.started)
        self.dtype = getattr(torch, record.about["dtype"])
        self.model, tokenizer = job.subject.load(job.task, self.dtype, stock=not job.subject.ranked)
        self.moments = None if job.moments is None else _moments.load(job.moments, job.subject, None)
        self.batches, notes = job.task.batches(self.model, tokenizer)
        if job.task.unused:
            notes.insert(0, f"Columns that are not read: {', '.join(job.task.unused)}.")
        for note in notes:
            typer.echo(note)
        self.evaluate: Evaluate = job.task.evaluate(self.batches, self.dtype)

    def all(self, missing: list[Setting]) -> None:
        """The rows one after the other, until one would not fit in."""
        expected = self.expected() if self.budget.limited else 0.0
        try:
            for setting in missing:
                if expected > self.budget.left():
                    left = f"{max(0.0, self.budget.left()):.0f} s are left"
                    typer.echo(f"--minutes {self.job.minutes:g}: a row takes about {expected:.0f} s, and {left}.")
                    return
                begun = time.monotonic()
                row = self.row(setting)
                expected = time.monotonic() - begun
                self.record.add(setting, row, expected)
                values = ", ".join(f"{name} {number(value)}" for name, value in row.metrics.items())
                typer.echo(f"{setting}: {values} ({expected:.1f} s)")
        except Interrupted:
            if self.job.out and self.record.rows:
                typer.echo(f"{self.job.out} has {len(self.record.rows)} rows. Go on with: {command_line()}", err=True)
            raise

    def row(self, setting: Setting) -> RankRow:
        """One row. Ranks have their parameters too, since budgets may be measured another time."""
        if setting == Setting():
            with evaluating(self.model), adapters_disabled(self.model):
                metrics, samples = measured_samples(self.evaluate, self.model)
            return RankRow(None, metrics, samples=samples)
        ranks = [] if setting.rank is None else [setting.rank]
        budgets = [] if setting.budget is None else [setting.budget]
        with bad_input("--ranks, --budgets"):
            how: dict[str, Any] = {"budgets": budgets, "moments": self.moments}
            curve = rank_curve(self.model, self.evaluate, ranks, base=False, progress=False, **how)
        return curve.rows[0]

    def expected(self) -> float:
        """Seconds for a row, by those of its first batch."""
        one = self.job.task.evaluate(self.batches[:1], self.dtype)
        tokens = [batch["input_ids"].numel() for batch in self.batches]
        times = []
        for _ in range(2):  # the first one sets things up
            begun = time.monotonic()
            with evaluating(self.model):
                one(self.model)
            times.append(time.monotonic() - begun)
        return times[-1] * sum(tokens) / tokens[0]


def _command_for(job: Curving, row: RankRow) -> str:
    """The command that writes what was recommended: of DyLoRA as the model has it, which may be calibrated."""
    if row.rank is not None and job.subject.kind in ("DYLORA", "QDYLORA") and job.moments is None:
        return f"peft-dynamic export {job.subject.shown} OUT --rank {row.rank}"
    size = f"--rank {row.rank}" if row.rank is not None else f"--parameters {row.parameters}"
    by = f" --moments {job.moments}" if job.moments else ""
    return f"peft-dynamic resize {job.subject.shown} OUT {size}{by}"


def _show(job: Curving, record: Record, whole: bool) -> dict[str, Any]:
    """Print the table, the choice and the picture; the choice as an answer."""
    curve = record.curve
    found: dict[str, Any] = {"recommended": None, "why": None, "command": None}
    if not curve.rows:
        return found
    typer.echo(curve.table(), nl=False)
    metric = job.metric or curve.metrics[0]
    if metric not in curve.metrics:
        raise typer.BadParameter(
            f"{metric} was not measured; there are {', '.join(curve.metrics)}.", param_hint="--metric"
        )
    if len(curve.rows) > (curve.rows[0].is_base):
        row, said = choice(curve, metric, job.tolerance)
        found["why"] = f"{'' if whole else 'So far. '}{said}"
        typer.echo(found["why"])
        if row is not None:
            found["recommended"] = str(Setting(row.rank, row.budget))
        if whole and row is not None:
            found["command"] = _command_for(job, row)
            typer.echo(f"Write it: {found['command']}")
        if job.plot is not None:
            title = f"{job.subject.folder.name} on {Path(job.task.given.data).name}"
            curve.plot(job.plot, title, mark=row is not None, tolerance=job.tolerance, metric=metric)
            typer.echo(f"The picture is in {job.plot}.")
    if job.out is not None:
        typer.echo(f"The curve is in {job.out}.")
    return found
