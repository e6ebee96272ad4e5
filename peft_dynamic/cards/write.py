"""The README.md beside an adapter. What we write stands between two marks; a user's own text and metadata stay."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from peft_dynamic.cards.elsewhere import elsewhere
from peft_dynamic.cards.facts import CardFacts, Twin
from peft_dynamic.cards.text import code, fenced, inline, one_line, table
from peft_dynamic.cards.usage import about, base_repo, loading, warn_of_class
from peft_dynamic.methods import method_of

START, END = "<!-- peft_dynamic: usage -->", "<!-- peft_dynamic: end of usage -->"
# The Hub's names for the tasks of PEFT's adapters
TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_OUR_RESULT = re.compile(r".* \(rank \d+\)", re.DOTALL)


def write_model_card(
    directory: str | Path, repo_id: str | None = None, facts: CardFacts | None = None, config: Any = None
) -> Path:
    """Write how to use an adapter into the README.md beside it: with `import peft_dynamic` for an adapter of ours.

    A README that is there already stays, but for the part that an earlier call wrote and for PEFT's form with nothing
    filled in: the usage goes to its top, and what its metadata lacks is added.

    Args:
        directory: a saved adapter, i.e. a folder with an adapter_config.json.
        repo_id: the name to load it by; None for the folder's own name.
        facts: what else is known of it.
        config: of the adapter with all ranks, where `facts.whole` says that it is not at the top.

    Returns:
        The path of the README.md.

    Raises:
        FileNotFoundError: the folder holds no adapter.

    Warns:
        UserWarning: the adapter says neither its task nor its model's class, so the card cannot say how to load it.
    """
    directory = Path(directory)
    if not (directory / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"directory={str(directory)!r} has no adapter_config.json: pass a folder that save_pretrained or "
            "export_lora wrote."
        )
    facts = facts or CardFacts()
    top = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    whole = config or top
    warn_of_class(top)
    path = directory / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\n---\n"
    card = ModelCard(text, ignore_metadata_errors=True)
    source = one_line(repo_id or Path(os.path.abspath(directory)).name)  # "." and ".." have no name to call it by
    parts = (f"{START}\n{_body(top, whole, source, facts)}\n{END}", own_text(card.text))
    card.text = "\n" + "\n\n".join(part for part in parts if part)
    _fill_in(card.data, whole, source, facts)
    card.save(path)
    return path


def merge_readmes(local: Path | None, remote: Path | None, into: Path) -> None:
    """A README of what its owner wrote in two: the text beside the adapter, or else that in the repository.

    Args:
        local: the README beside the adapter; its metadata win.
        remote: the one in the repository.
        into: the file to write; it goes away where there is neither.
    """
    cards = [
        ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True) for path in (local, remote) if path
    ]
    into.unlink(missing_ok=True)
    if not cards:
        return
    data: dict[str, Any] = {}
    for card in reversed(cards):
        found = card.data.to_dict()
        data |= found | {"tags": [*_tags(data), *(tag for tag in _tags(found) if tag not in _tags(data))]}
    merged = ModelCard(f"---\n{ModelCardData(**data, ignore_metadata_errors=True).to_yaml()}\n---\n")
    merged.text = next((text for card in cards if (text := own_text(card.text))), "")
    merged.save(into)


def own_text(body: str) -> str:
    """What a user wrote below the metadata: all but our part, and PEFT's form where nothing is filled in."""
    body = re.sub(f"{re.escape(START)}.*?{re.escape(END)}", "", body, flags=re.DOTALL).strip()
    filled = re.sub(r"### Framework versions\s+- PEFT \S+$", "", body)
    return "" if not body or filled.split() == _form() else body


@cache
def _form() -> list[str]:
    """The words of PEFT's form; the template takes longer to read than all else here."""
    return str(ModelCard.from_template(ModelCardData()).text).split()


def _body(top: Mapping[str, Any], whole: Mapping[str, Any], source: str, facts: CardFacts) -> str:
    base = facts.base_model or base_repo(top)
    parts = [f"# {inline(source)}", about(top), fenced(loading(top, base, source, facts.subfolder), "python")]
    if facts.whole:
        parts += [
            "## Every rank",
            f"The folder {code(facts.whole)} has the whole adapter. {about(whole)}",
            fenced(loading(whole, base, source, facts.whole), "python"),
        ]
    twins = [twin for twin in facts.twins if twin.folder]
    if twins:
        parts += _twins(top, base, source, twins)
    parts += elsewhere(whole, base, source, facts)
    if facts.rows:
        parts += ["## What each rank is worth", *_curve(facts)]
    if training := _training(base, facts):
        parts += ["## Training", training]
    if facts.samples:
        parts += ["## Samples", *(fenced(sample) for sample in facts.samples)]
    return "\n\n".join(parts)


def _twins(config: Mapping[str, Any], base: str | None, source: str, twins: list[Twin]) -> list[str]:
    title = "## Smaller ranks" if method_of(config) is None else "## Without peft_dynamic"
    folders = ", ".join(code(twin.folder) for twin in twins)
    return [
        title,
        f"Each of these folders is a stock LoRA adapter, which PEFT loads alone: {folders}.",
        fenced(loading(config, base, source, twins[-1].folder, stock=True), "python"),
    ]


def _curve(facts: CardFacts) -> list[str]:
    parts = []
    if facts.picture:
        parts.append(f"![what each rank is worth]({facts.picture})")
    if facts.recommended is not None:
        parts.append(f"Rank {facts.recommended} is the smallest that is good enough.")
    parts.append(table([inline(name) for name in facts.columns], [[inline(x) for x in row] for row in facts.rows]))
    return parts


def _training(base: str | None, facts: CardFacts) -> str:
    lines = []
    if base:
        licence = f" Its licence, by its own card, is {code(facts.base_license)}." if facts.base_license else ""
        lines.append(f"The base model is [{inline(base)}](https://huggingface.co/{base}).{licence}")
    if facts.dataset:
        lines.append(f"The data are [{inline(facts.dataset)}](https://huggingface.co/datasets/{facts.dataset}).")
    if facts.settings:
        rows = [[inline(name), inline(value)] for name, value in facts.settings]
        return "\n\n".join([" ".join(lines), table(["setting", "value"], rows)]).strip()
    return " ".join(lines) if facts.dataset or facts.base_license else ""


def _fill_in(data: Any, config: Mapping[str, Any], source: str, facts: CardFacts) -> None:
    """The metadata, without touching what a user has in it."""
    data.library_name = "peft"
    base = facts.base_model or base_repo(config)
    if facts.base_model or not _is_shareable(data.base_model):  # PEFT writes where it was on this machine
        data.base_model = base
    method = method_of(config)
    own = method.tags if method is not None else [one_line(config["peft_type"], 40).lower()]
    tags = _tags({"tags": data.tags})
    adapts = "base_model:adapter:"  # as PEFT begins a tag of its own, with the base model's place behind it
    tags = [f"{tag}" for tag in tags if not str(tag).startswith(adapts) or _is_shareable(str(tag)[len(adapts) :])]
    data.tags = [*tags, *(tag for tag in own if tag not in tags)]
    if facts.license:
        data.license = facts.license
    if facts.dataset and not data.datasets:
        data.datasets = [facts.dataset]
    task = TASKS.get(str(config.get("task_type")))
    if facts.results and task and not data.pipeline_tag:
        data.pipeline_tag = task
    if facts.results and task:
        kept = [each for each in data.eval_results or [] if not _OUR_RESULT.fullmatch(str(each.metric_name))]
        data.eval_results = [*kept, *_results(task, facts)]
        data.model_name = data.model_name or source.rpartition("/")[2]


def _tags(data: Mapping[str, Any]) -> list[Any]:
    tags = data.get("tags") or []
    return [tags] if isinstance(tags, str) else [*tags]


def _is_shareable(base: Any) -> bool:
    """Whether metadata name base models that others can find: names on the Hub, not folders."""
    names = base if isinstance(base, list) else [base]
    return bool(base) and all(isinstance(name, str) and base_repo({"base_model_name_or_path": name}) for name in names)


def _results(task: str, facts: CardFacts) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=facts.dataset or "unknown",
            dataset_name="held-out rows",
            metric_type=one_line(metric, 60),
            metric_name=f"{one_line(metric, 60)} (rank {facts.results_rank})",
            metric_value=value,
        )
        for metric, value in facts.results
    ]
