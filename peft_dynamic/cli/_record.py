"""A curve that grows row by row in a file, and says what it was measured of: nothing is measured twice, or mixed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from peft_dynamic.cli._identity import differences, versions
from peft_dynamic.cli._setting import Setting as Setting  # here before
from peft_dynamic.ranks import RankCurve, RankRow


@dataclass
class Record:
    """The rows so far.

    Args:
        path: the file that has them; None for no file.
        about: what they are measured of, and how.
        rows: setting -> row.
        seconds: setting, as it is written -> how long it took.
    """

    path: Path | None
    about: dict[str, Any]
    rows: dict[Setting, RankRow] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def curve(self) -> RankCurve:
        """The rows in their order."""
        return RankCurve([self.rows[at] for at in sorted(self.rows, key=lambda at: at.order)])

    def add(self, setting: Setting, row: RankRow, seconds: float) -> None:
        """Take a row in, and write the file, whole or not at all."""
        self.rows[setting] = row
        self.seconds[str(setting)] = round(seconds, 3)
        if self.path is None:
            return
        measured = {"of": self.about, "seconds": self.seconds, "versions": versions()}
        text = json.dumps({**json.loads(self.curve.to_json()), "measured": measured}, indent=2) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.new")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path)

    def go_on(self) -> list[str]:
        """Take in what the file has, if there is one; the versions that are others now.

        Raises:
            typer.BadParameter: the file is another one, or its rows are of something else.
        """
        if self.path is None or not self.path.exists():
            return []
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            measured = content["measured"]
            curve = RankCurve.from_json(self.path)
            then, self.seconds = dict(measured["of"]), dict(measured["seconds"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise typer.BadParameter(
                f"{self.path} is there already, and no curve that measure wrote. Pass another file, or remove it.",
                param_hint="--out",
            ) from error
        self.about = {**self.about, "dtype": then.get("dtype")}  # what fits this machine now may be another
        if changed := differences(then, self.about):
            raise typer.BadParameter(
                f"{self.path} holds another measurement: {'; '.join(changed)}. Pass another file, or remove it.",
                param_hint="--out",
            )
        self.rows = {Setting(row.rank, row.budget): row for row in curve.rows}
        return differences(measured.get("versions"), versions())
