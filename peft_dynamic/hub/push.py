"""The push: what goes up is made and checked whole on this machine first, and goes up as one commit."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from torch import nn

from peft_dynamic.cards import REPO_ID, CardFacts, Twin, base_repo, merge_readmes, write_model_card
from peft_dynamic.hub.known import Beside, adapter_in, beside, check_base, check_license, draw, facts_of
from peft_dynamic.hub.twins import Source, Twins, engines_of, is_lora, source_of, write_twins
from peft_dynamic.ranks import RankCurve

WHOLE = "dynamic"  # the folder of the adapter with all ranks, where a stock LoRA is at the top
CORE = ("adapter_config.json", "adapter_model.safetensors")
# Of a folder nothing else goes up: checkpoints have optimizers, random states, and arguments with paths in them.
ALSO = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
# What an earlier push wrote, and this one may not have: twins of an adapter that is no more.
OURS = tuple(f"{place}/{file}" for place in ("rank-[0-9]*", WHOLE) for file in (*CORE, "README.md"))


@dataclass
class Shared:
    """What is ready to go up.

    Attributes:
        folder: with all files, as they will be in the repository.
        facts: of the card.
        config: of the adapter with all ranks.
        why_none: why there are no twins, where nobody asked for any; empty where there are.
    """

    folder: Path
    facts: CardFacts
    config: dict[str, Any]
    why_none: str = ""
    own_readme: Path | None = None

    @property
    def base(self) -> str | None:
        """The base model's name on the Hub, where it is known."""
        return self.facts.base_model or base_repo(self.config)

    def files(self) -> list[tuple[str, int]]:
        """Path and bytes of each file."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [(path.relative_to(self.folder).as_posix(), path.stat().st_size) for path in paths]


@dataclass
class Wanted:
    """How an adapter is shared: the arguments of `push_adapter` that are not the Hub's."""

    ranks: Sequence[int] | None = None
    lora_rank: int | None = None
    license: str | None = None
    base_model: str | None = None
    curve: RankCurve | None = None
    samples: Iterable[str] | bool = field(default=True)


def push_adapter(
    model: nn.Module | str | os.PathLike[str],
    repo_id: str,
    adapter_name: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
    *,
    ranks: Sequence[int] | None = None,
    lora_rank: int | None = None,
    license: str | None = None,
    base_model: str | None = None,
    curve: RankCurve | None = None,
    samples: Iterable[str] | bool = True,
) -> str:
    """Push an adapter, a DyLoRA adapter at all its ranks, to the Hub, with plain-LoRA twins of it and a model card.

    The repository is made if it does not exist. The twins are stock LoRA adapters in folders, which PEFT loads without
    this package: `PeftModel.from_pretrained(base, repo_id, subfolder="rank-4")`. Of a DyLoRA adapter they are what
    `export_lora(model, rank=)` writes, of a stock LoRA what `resize_adapter` does. Twins of an earlier push that this
    one does not have are removed. All of it is one commit, so that a push that fails leaves the repository as it was.

    Args:
        model: a `PeftModel`, a transformers model with the adapter added by `add_adapter`, or the folder of a saved
            adapter, for which no base model is loaded; also the output of `peft-dynamic train`. The adapter is one of
            ours, or a stock LoRA. Of a folder only the adapter and its tokenizer go up.
        repo_id: the repository, e.g. "me/my-adapter".
        adapter_name: the adapter; None for the first active one.
        private: whether a new repository is private; None for the account's default.
        token: the access token; None for the one that `hf auth login` stored.
        revision: the branch to push to; made if it does not exist.
        commit_message: of the commit.
        create_pr: open a pull request instead of pushing.
        ranks: of the twins; an empty list for none. None for a few of the trained ranks: the largest, its half, and so
            on, at most four; of a stock LoRA those below its own, and none of an adapter that is no LoRA.
        lora_rank: put the stock LoRA of this rank at the top, for those who load it without `subfolder=`; the whole
            adapter goes into the folder `dynamic`.
        license: the adapter's licence, by its name on the Hub; None to say nothing of it.
        base_model: the base model's name on the Hub, where the adapter has a local folder's. A folder's name does not
            go up.
        curve: what each rank is worth, for the card; None for the curve.json beside the adapter, if there is one.
        samples: prompts with answers, for the card; True for those of the report.md beside the adapter, False for none.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: the model has no such adapter, the adapter no such rank, `repo_id` is no repository name, or an
            argument has no meaning. Nothing is sent then.
        FileNotFoundError: the folder has no adapter.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    check_repo(repo_id)
    if create_pr and revision is not None:
        raise ValueError(
            f"revision={revision!r}: a pull request goes to the main branch. Leave it out, or create_pr=True."
        )
    wanted = Wanted(ranks, lora_rank, license, base_model, curve, samples)
    with ready(model, adapter_name, wanted) as shared:
        if shared.why_none and is_lora(shared.config):
            warnings.warn(f"the repository has no plain-LoRA twins: {shared.why_none}", stacklevel=2)
        return send(shared, repo_id, private, token, revision, commit_message, create_pr)


def check_repo(repo_id: str) -> None:
    """Raise ValueError for what is no name of a repository."""
    try:
        if not REPO_ID.fullmatch(repo_id):
            raise HFValidationError("a name has letters, digits and . - _ alone")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is no repository name: pass 'user/name'.") from error


@contextmanager
def ready(adapter: nn.Module | str | os.PathLike[str], adapter_name: str | None, wanted: Wanted) -> Iterator[Shared]:
    """All that goes up but the card, in a folder that is gone afterwards.

    Raises:
        ValueError, FileNotFoundError: as in `push_adapter`.
    """
    check_license(wanted.license)
    check_base(wanted.base_model)
    with tempfile.TemporaryDirectory(prefix="peft_dynamic-") as work:
        saved, target = Path(work, "saved"), Path(work, "repository")
        saved.mkdir()
        target.mkdir()
        found = Beside()
        if not isinstance(adapter, nn.Module):
            adapter = adapter_in(adapter)
            found = beside(adapter)
        source = source_of(adapter, adapter_name, saved)
        config = source.written
        facts = facts_of(
            config,
            found,
            curve=wanted.curve,
            samples=wanted.samples,
            license=wanted.license,
            base_model=wanted.base_model,
        )
        why_none = _lay_out(source, target, Path(work, "between"), wanted, facts)
        facts.picture = draw(wanted.curve, found, target) if facts.rows else None
        readme = source.folder / "README.md"
        for path in target.rglob("adapter_config.json"):
            _name_base(path, wanted.base_model)
        yield Shared(target, facts, config, why_none, readme if readme.is_file() else None)


def _lay_out(source: Source, target: Path, between: Path, wanted: Wanted, facts: CardFacts) -> str:
    """The adapter and its twins in their places; why there are no twins, where none were asked for."""
    asked = wanted.lora_rank is not None or bool(wanted.ranks)
    twins, why_none = None, ""
    if asked or wanted.ranks is None:
        try:
            twins = Twins(source, between)
            ranks = twins.usual() if wanted.ranks is None else twins.check(wanted.ranks, "ranks")
            top = None if wanted.lora_rank is None else twins.check([wanted.lora_rank], "lora_rank")[0]
            facts.twins = write_twins(twins, [rank for rank in ranks if rank != top], target)
            if top is not None:
                twins.write(top, between / "top")
        except ValueError as error:
            if asked:
                raise
            why_none, twins = str(error), None
            for path in target.iterdir():
                shutil.rmtree(path)
    lora_rank = wanted.lora_rank
    if lora_rank is None or twins is None or (source.is_stock and lora_rank == twins.largest):
        _copy(source.folder, target, (*CORE, *ALSO))
        if twins is not None and source.is_stock:
            facts.twins.append(Twin(twins.largest, "", engines_of(target)))
        return why_none
    _copy(between / "top", target, CORE)
    _copy(source.folder, target, ALSO)
    facts.twins.append(Twin(lora_rank, "", engines_of(target)))
    if not source.is_stock:
        facts.whole = WHOLE
        _copy(source.folder, target / WHOLE, CORE)
    elif not any(twin.rank == twins.largest for twin in facts.twins):
        facts.twins += write_twins(twins, [twins.largest], target)
    return why_none


def _copy(folder: Path, target: Path, names: Iterable[str]) -> None:
    target.mkdir(exist_ok=True)
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def _name_base(path: Path, base_model: str | None) -> None:
    """The base model's name on the Hub into a configuration; a folder on this machine is nobody's business."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_model or base_repo(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def write_cards(shared: Shared, repo_id: str, theirs: Path | None = None) -> None:
    """The card at the top, over a user's own text if there is some, and a short one for each folder.

    Args:
        shared: what goes up.
        repo_id: the repository.
        theirs: the README that is in the repository.
    """
    merge_readmes(shared.own_readme, theirs, shared.folder / "README.md")
    config = {**shared.config, "base_model_name_or_path": shared.base}
    write_model_card(shared.folder, repo_id, shared.facts, config if shared.facts.whole else None)
    for path in sorted(shared.folder.glob("*/adapter_config.json")):
        (path.parent / "README.md").unlink(missing_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the base model's class, as the top's
            write_model_card(path.parent, repo_id, CardFacts(license=shared.facts.license, subfolder=path.parent.name))


def send(
    shared: Shared,
    repo_id: str,
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    """Make the repository if need be, and send all of it as one commit; the address of that."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = set(api.list_repo_files(repo_id, revision=revision))
    with tempfile.TemporaryDirectory(prefix="peft_dynamic-") as work:
        theirs = _fetched(repo_id, revision, token, Path(work)) if "README.md" in there else None
        write_cards(shared, repo_id, theirs)
        names = [name for name, _ in shared.files()]
        stale = [name for name in there if any(fnmatchcase(name, each) for each in OURS) and name not in names]
        # Not upload_folder: with hf_xet it sends a large folder as several commits.
        commit = api.create_commit(
            repo_id=repo_id,
            operations=[
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=shared.folder / name) for name in names),
                *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale)),
            ],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(getattr(commit, "pr_url", None) or getattr(commit, "commit_url", commit))


def _fetched(repo_id: str, revision: str | None, token: str | None, work: Path) -> Path | None:
    """The README that is in the repository: what its owner wrote there stays."""
    try:
        return Path(hf_hub_download(repo_id, "README.md", revision=revision, token=token, local_dir=work))
    except EntryNotFoundError:
        return None
