"""What lies beside a saved adapter that strangers may see: its run's settings, its curve, its samples.

Notable: settings are shown by a list of what may be. A run.yaml also has paths, names of files and of users, and what a
later version writes into it is not known here.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from peft_dynamic.cards import REPO_ID, CardFacts, base_repo
from peft_dynamic.ranks import RankCurve
from peft_dynamic.reports.curve import number

RUN, CURVE, REPORT, PICTURE = "run.yaml", "curve.json", "report.md", "curve.png"
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,59}")
# Of our own command and of TRL's configurations, in the order of the card
SHOWN = (
    *("r", "lora_r", "ranks", "lora_alpha", "lora_dropout", "truncation", "scaling", "rank_sampling", "update"),
    *("target_modules", "lora_target_modules", "steps", "max_steps", "epochs", "num_train_epochs"),
    *("batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "max_length", "packing", "seed", "rows", "held_out_rows"),
    *("4bit", "load_in_4bit", "load_in_8bit", "dtype", "bf16", "fp16"),
    *("torch", "transformers", "peft", "trl", "peft_dynamic"),
)
_WORD = re.compile(r"[\w.+-]{1,40}", re.ASCII)
_DATA_FILES = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".txt"}
_FENCED = re.compile(r"^(?P<fence>`{3,})text\n(?P<body>.*?)\n(?P=fence)$", re.MULTILINE | re.DOTALL)


@dataclass
class Beside:
    """The files of a run that are there.

    Attributes:
        run: its settings.
        curve: what each rank is worth.
        picture: of the curve.
        report: with the samples.
        exported: the folder of the rank that the run chose.
    """

    run: Path | None = None
    curve: Path | None = None
    picture: Path | None = None
    report: Path | None = None
    exported: Path | None = None


def adapter_in(folder: str | os.PathLike[str]) -> Path:
    """The adapter's own folder: the one given, or the one that a run of `peft-dynamic train` has in it.

    Raises:
        FileNotFoundError: there is no adapter in either.
    """
    given = Path(folder).expanduser()
    for place in (given, given / "adapter"):
        if (place / "adapter_config.json").is_file():
            return place
    raise FileNotFoundError(
        f"{str(folder)!r} has no adapter_config.json, and no folder `adapter` with one. Pass a folder that "
        "save_pretrained wrote, or the output of peft-dynamic train."
    )


def beside(adapter: Path) -> Beside:
    """The files of its run, in the adapter's folder or, of a run of `peft-dynamic train`, in the one above."""
    above = adapter.absolute().parent
    is_run = adapter.absolute().name in ("adapter", "lora") and (above / RUN).is_file()
    places = [adapter, above] if is_run else [adapter]

    def first(name: str) -> Path | None:
        return next((place / name for place in places if (place / name).is_file()), None)

    exported = above / "lora" if is_run and (above / "lora" / "adapter_config.json").is_file() else None
    return Beside(first(RUN), first(CURVE), first(PICTURE), first(REPORT), exported)


def check_license(license: str | None) -> None:
    """Raise ValueError for what is no name of a licence."""
    if license is not None and not LICENSE.fullmatch(license):
        raise ValueError(
            f"license={license!r}: must be one of the Hub's names of licences, such as apache-2.0, mit or cc-by-4.0."
        )


def check_base(base_model: str | None) -> None:
    """Raise ValueError for what is no name on the Hub."""
    if base_model is not None and not REPO_ID.fullmatch(base_model):
        raise ValueError(f"base_model={base_model!r}: must be a name on the Hub, such as 'user/name'.")


def facts_of(
    config: Mapping[str, Any],
    found: Beside,
    *,
    curve: RankCurve | None = None,
    samples: Iterable[str] | bool = True,
    license: str | None = None,
    base_model: str | None = None,
) -> CardFacts:
    """What the card can say.

    Args:
        config: the values of the adapter's adapter_config.json.
        found: the files of its run.
        curve: what each rank is worth, instead of the run's.
        samples: prompts with answers; True for those of the run's report, False for none.
        license: of the adapter.
        base_model: the base model's name on the Hub, where the adapter has another.

    Raises:
        ValueError: a file is damaged, or an argument has no meaning.
    """
    check_license(license)
    check_base(base_model)
    facts = CardFacts(license=license, base_model=base_model)
    facts.base_license = _license_of(base_model or base_repo(config))
    if found.run is not None:
        content = _read(found.run)
        facts.settings = [*_settings(content)]
        facts.dataset = _dataset(content)
    if curve is None and found.curve is not None:
        curve = RankCurve.from_json(found.curve)
    if curve is not None and curve.rows:
        _take_curve(facts, curve, _rank_of(found.exported))
    if samples is True:
        facts.samples = samples_of(found.report.read_text(encoding="utf-8")) if found.report is not None else []
    elif samples:
        facts.samples = [str(sample) for sample in samples]
    return facts


def draw(curve: RankCurve | None, found: Beside, into: Path) -> str | None:
    """Put the curve's picture into a folder: the run's, or one drawn now where matplotlib is there; its name."""
    target = into / PICTURE
    if curve is None and found.picture is not None:
        if found.picture.absolute() != target.absolute():
            shutil.copyfile(found.picture, target)
        return PICTURE
    if curve is None and found.curve is not None:
        curve = RankCurve.from_json(found.curve)
    if curve is None or not curve.positions:
        return None
    try:
        curve.plot(target)
    except ImportError:
        return None
    return PICTURE


def samples_of(report: str) -> list[str]:
    """The blocks under the heading "Samples" of a report of `peft-dynamic train`."""
    blocks = [(match.start(), match.end(), match["body"]) for match in _FENCED.finditer(report)]
    inside = [range(start, end) for start, end, _ in blocks]
    headings = [
        (match.start(), match[1].strip())
        for match in re.finditer(r"^## (.*)$", report, re.MULTILINE)
        if not any(match.start() in span for span in inside)
    ]
    start = next((place for place, name in headings if name == "Samples"), len(report))
    end = next((place for place, _ in headings if place > start), len(report))
    return [body for place, _, body in blocks if start < place < end]


def _read(path: Path) -> Any:
    """A run.yaml: JSON as our command writes it, or any other YAML."""
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)  # first: YAML 1.1 reads 5e-05 as a text
    except ValueError:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path.name} is no YAML ({' '.join(str(error).split())[:200]}). Remove it.") from error


def _walk(content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield str(key), value
            yield from _walk(value)


def _settings(content: Any) -> Iterator[tuple[str, str]]:
    """Name and value of each setting that may be shown, and whose value is a number or one plain word."""
    found: dict[str, Any] = {}
    for key, value in _walk(content):
        found.setdefault(key, value)
    for key in SHOWN:
        value = found.get(key)
        values = value if isinstance(value, list) and 0 < len(value) <= 16 else [value]
        words = [_word(each) for each in values]
        if all(words):
            yield key, ", ".join(map(str, words))


def _word(value: Any) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def _dataset(content: Any) -> str | None:
    """The data's name on the Hub; None for files and folders, which are the author's own business."""
    for key, value in _walk(content):
        if key in ("source", "dataset_name") and isinstance(value, str):
            is_name = REPO_ID.fullmatch(value) and value.count("/") == 1 and not value.startswith(".")
            if is_name and not _DATA_FILES & set(Path(value).suffixes) and not Path(value).exists():
                return value
    return None


def _license_of(base: str | None) -> str | None:
    """The licence in the base model's card, where the card is on this machine."""
    card = try_to_load_from_cache(base, "README.md") if base else None
    if not isinstance(card, str):
        return None
    try:
        license = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (OSError, ValueError):
        return None
    return license if isinstance(license, str) and LICENSE.fullmatch(license) else None


def _rank_of(exported: Path | None) -> int | None:
    """The rank that a run has chosen and exported."""
    if exported is None:
        return None
    rank = json.loads((exported / "adapter_config.json").read_text(encoding="utf-8")).get("r")
    return rank if isinstance(rank, int) else None


def _take_curve(facts: CardFacts, curve: RankCurve, chosen: int | None) -> None:
    metrics = curve.metrics
    facts.columns = [*curve.settings(curve.rows[0]), *metrics]
    facts.rows = [
        [*curve.settings(row).values(), *(number(row.metrics[name]) if name in row.metrics else "" for name in metrics)]
        for row in curve.rows
    ]
    best = curve.choice(metrics[0], 0.01) if chosen is None and metrics else None
    facts.recommended = chosen if chosen is not None else best.rank if best is not None else None
    at = facts.recommended if facts.recommended in curve.ranks else max(curve.ranks, default=None)
    if at is not None:
        facts.results_rank = at
        facts.results = [(name, value) for name, value in curve[at].items() if math.isfinite(value)]
