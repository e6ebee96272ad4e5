"""`peft-dynamic push`: a saved adapter to the Hub, with plain-LoRA twins and a card."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from peft_dynamic.cli._edge import UserError
from peft_dynamic.cli._given import bad_input, require
from peft_dynamic.cli._hub import (
    BASE_MODEL,
    CURVE,
    JSON,
    LICENSE,
    LOG_IN,
    SAMPLES,
    SAVED,
    check_card_options,
    check_repo_name,
    check_saved,
    hub_told,
    read_curve,
    without_token,
)


def push(
    adapter: SAVED,
    repo: Annotated[str, typer.Argument(help="The repository: user/name. It is made if it is not there.")],
    ranks: Annotated[
        str | None,
        typer.Option(help="Ranks of the plain-LoRA twins, as 4,8; or none. Default: the largest, its half, and so on."),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Put the stock LoRA of this rank at the top; the whole adapter into dynamic/.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to push to. Default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload adapter",
    license: LICENSE = None,
    base_model: BASE_MODEL = None,
    curve: CURVE = None,
    samples: SAMPLES = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files that would go up, and send nothing.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Share an adapter on the Hub: at all its ranks, and as stock LoRAs that load without this package.

    For example: peft-dynamic push peft-dynamic-out me/poet --ranks 4,8 --license apache-2.0
    """
    check_saved(adapter)
    check_repo_name(repo)
    wanted_ranks = _ranks(ranks)
    require(lora_rank is None or lora_rank >= 1, "--lora-rank", lora_rank, "at least 1")
    check_card_options(license, base_model, curve)
    if create_pr and revision is not None:
        raise typer.BadParameter("a pull request goes to the main branch. Pass one of them.", param_hint="--revision")
    from peft_dynamic.hub.push import Wanted, check_repo, ready, send, write_cards

    with bad_input("REPO"):
        check_repo(repo)
    if not dry_run:
        _check_token()
    wanted = Wanted(wanted_ranks, lora_rank, license, base_model, read_curve(curve), samples)
    with ExitStack() as stack:
        with bad_input("--ranks, --lora-rank or ADAPTER"):
            shared = stack.enter_context(ready(adapter, None, wanted))
        address = None
        if dry_run:
            write_cards(shared, repo)
        else:
            with hub_told(repo):
                address = send(shared, repo, private or None, None, revision, message, create_pr)
        _tell(shared, repo, address, as_json)


def _ranks(ranks: str | None) -> list[int] | None:
    if ranks is None:
        return None
    if ranks.strip() == "none":
        return []
    try:
        found = [int(rank) for rank in ranks.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"{without_token(ranks)}: must be whole numbers, such as 4,8; or none.", param_hint="--ranks"
        ) from error
    require(all(rank >= 1 for rank in found), "--ranks", ranks, "ranks of at least 1")
    return found


def _check_token() -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(f"HF_TOKEN: there is no token of the Hub on this machine. {LOG_IN}")


def _tell(shared: Any, repo: str, address: str | None, as_json: bool) -> None:
    files, facts = shared.files(), shared.facts
    twins = [{"rank": each.rank, "folder": each.folder, "engines": list(each.engines)} for each in facts.twins]
    if as_json:
        done = {
            "repo": repo,
            "url": address,
            "dry_run": address is None,
            "twins": twins,
            "no_twins": shared.why_none or None,
            "base_model": shared.base,
            "files": [{"path": path, "bytes": size} for path, size in files],
        }
        typer.echo(json.dumps(done, indent=2))
        return
    count = f"{len(files)} files, {sum(size for _, size in files):,} bytes"
    if address is None:
        width = max(len(path) for path, _ in files)
        for path, size in files:
            typer.echo(f"{path:{width}}  {size:>12,}")
        typer.echo(f"{count}, would go to {repo}. Nothing was sent.")
    else:
        typer.echo(f"{repo} has {count}: {address}")
    folders = [twin for twin in facts.twins if twin.folder]
    if folders:
        ranks = ", ".join(str(twin.rank) for twin in folders)
        load = f'PeftModel.from_pretrained(base, "{repo}", subfolder="{folders[-1].folder}")'
        typer.echo(f"Stock LoRAs of rank {ranks}: {load}")
    if shared.why_none:
        typer.echo(f"There are no plain-LoRA twins: {shared.why_none}")
    if facts.samples:
        typer.echo(f"The card shows {len(facts.samples)} samples of the run's report; --no-samples leaves them out.")
    if shared.base is None:
        typer.echo("The base model's name on the Hub is not known, and the card does not have it: pass --base-model.")
