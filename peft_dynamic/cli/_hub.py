"""What `push` and `card` share, and what goes wrong with the Hub, in one line each. No message has a token in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_dynamic.cli._edge import UserError, reason
from peft_dynamic.cli._given import bad_input

SAVED = Annotated[str, typer.Argument(help="A folder with a saved adapter, or the output of peft-dynamic train.")]
LICENSE = Annotated[
    str | None, typer.Option(help="The adapter's licence, by its name on the Hub: apache-2.0, mit, ...")
]
BASE_MODEL = Annotated[
    str | None, typer.Option(help="The base model's name on the Hub, where the adapter has a folder's.")
]
CURVE = Annotated[
    Path | None, typer.Option(help="What each rank is worth, from measure --out. Default: the run's curve.json.")
]
SAMPLES = Annotated[bool, typer.Option(help="Show the prompts and answers of the run's report in the card.")]
JSON = Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")]

NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
LOG_IN = "Log in with: hf auth login. Or set HF_TOKEN to a token that may write."


def check_saved(adapter: str) -> None:
    """Stop unless there is a saved adapter, or a run with one."""
    folder = Path(adapter).expanduser()
    if not any((place / "adapter_config.json").is_file() for place in (folder, folder / "adapter")):
        raise typer.BadParameter(
            f"{without_token(adapter)} has no adapter_config.json. Pass a folder that save_pretrained wrote, or the "
            "output of peft-dynamic train.",
            param_hint="ADAPTER",
        )


def check_repo_name(repo: str, option: str = "REPO") -> None:
    """Stop unless this may be the name of a repository."""
    if _TOKEN.fullmatch(repo.rpartition("/")[2]):
        raise typer.BadParameter("this is a token, not a name. Pass user/name, and revoke it.", param_hint=option)
    if not NAME.fullmatch(repo):
        raise typer.BadParameter(
            f"{without_token(repo)} is no name of a repository. Pass user/name.", param_hint=option
        )


def check_card_options(license: str | None, base_model: str | None, curve: Path | None) -> None:
    """Stop for what the card cannot say."""
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,59}", license):
        raise typer.BadParameter(
            f"{license}: must be a name of the Hub's, such as apache-2.0 or cc-by-4.0.", param_hint="--license"
        )
    if base_model is not None:
        check_repo_name(base_model, "--base-model")
    if curve is not None and not curve.is_file():
        raise typer.BadParameter(f"{curve} is not there. Pass the file of measure --out.", param_hint="--curve")


def read_curve(curve: Path | None) -> Any:
    """The curve of a file; None for none.

    Raises:
        typer.BadParameter: it is no curve.
    """
    if curve is None:
        return None
    from peft_dynamic.ranks import RankCurve

    with bad_input("--curve"):
        return RankCurve.from_json(curve)


def without_token(text: str) -> str:
    """The text without any access token."""
    return _TOKEN.sub("hf_***", text)


@contextmanager
def hub_told(repo: str) -> Iterator[None]:
    """What the Hub, or the way to it, says against a push.

    Raises:
        UserError: in place of its error; one line with the fix.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except Exception as error:
        chain = list(_causes(error))
        answered = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
        if answered is not None:
            raise UserError(_of_answer(answered, repo)) from None
        if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
            raise UserError("REPO: HF_HUB_OFFLINE is set, so that nothing can be sent. Unset it.") from None
        if any(type(each).__module__.startswith("httpx") or isinstance(each, ConnectionError) for each in chain):
            raise UserError(
                f"REPO: the Hub cannot be reached ({without_token(reason(chain[-1]))}). Check the network and "
                "HF_ENDPOINT, and push again."
            ) from None
        if isinstance(error, ValueError):  # what the Hub has against the card
            raise UserError(f"REPO: {without_token(reason(error))}. Mend the README.md or the options.") from None
        raise UserError(f"REPO: {without_token(reason(error))}. Push again.") from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _of_answer(error: Any, repo: str) -> str:
    """What to do about an answer of the Hub."""
    status = getattr(error.response, "status_code", None)
    kind = type(error).__name__
    if status == 401:
        return f"HF_TOKEN: the Hub does not know the token, or it has expired. {LOG_IN}"
    if kind == "RevisionNotFoundError":
        return f"--revision: {repo} has no such branch. Pass one that it has, or another name for a new one."
    said = without_token(" ".join(str(getattr(error, "server_message", None) or error).split())[:200].rstrip("."))
    if status == 403:
        return f"REPO: the Hub refused {repo} ({said}). Use a token that may write there, or another REPO."
    return f"REPO: the Hub answered {status} ({said}). {repo} is as it was; push again."
