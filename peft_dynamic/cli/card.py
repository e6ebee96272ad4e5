"""`peft-dynamic card`: the model card of a saved adapter, beside it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from peft_dynamic.cli._given import bad_input
from peft_dynamic.cli._hub import (
    BASE_MODEL,
    CURVE,
    JSON,
    LICENSE,
    SAMPLES,
    SAVED,
    check_card_options,
    check_repo_name,
    check_saved,
    read_curve,
)


def card(
    adapter: SAVED,
    curve: CURVE = None,
    license: LICENSE = None,
    base_model: BASE_MODEL = None,
    repo: Annotated[str | None, typer.Option(help="The name to load it by: user/name. Default: the folder's.")] = None,
    samples: SAMPLES = True,
    as_json: JSON = False,
) -> None:
    """Write the model card of a saved adapter: how to load it, what each rank is worth, how it was trained.

    For example: peft-dynamic card peft-dynamic-out --license apache-2.0
    """
    check_saved(adapter)
    check_card_options(license, base_model, curve)
    if repo is not None:
        check_repo_name(repo, "--repo")
    from peft_dynamic.hub.card import write_card

    with bad_input("ADAPTER"):
        path, facts = write_card(
            adapter, repo, license=license, base_model=base_model, curve=read_curve(curve), samples=samples
        )
    if as_json:
        done = {
            "card": str(path),
            "picture": None if facts.picture is None else str(path.with_name(facts.picture)),
            "recommended": facts.recommended,
            "samples": len(facts.samples),
        }
        typer.echo(json.dumps(done, indent=2))
        return
    typer.echo(f"The card is in {path}. A text of your own below the marked part stays.")
    if facts.samples:
        typer.echo(f"It shows {len(facts.samples)} samples of the run's report; --no-samples leaves them out.")
