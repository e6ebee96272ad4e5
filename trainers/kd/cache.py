"""A teacher's answers on disk, so that it is run once and is not in memory while the student trains.

Kept are a classifier's logits of each row. Of a causal model it is, for each token with a label, the state before the
head, or the k likeliest tokens. States are exact for every temperature and divergence, as the head is applied later.

A row is found by a hash of its own tokens, without padding: the order, epochs, batches, sampling, the side of the
padding and the number of processes do not matter. A row that has changed is missed, never answered with another's.

A folder has `meta.json`, shards of safetensors, which are mapped into memory, and for states the head. Each shard's own
metadata says which rows it has, so that a fill that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peft_dynamic.functional.exit_loss import IGNORED
from peft_dynamic.functional.kd_loss import Head, States, TopK
from peft_dynamic.hosts.blocks import base_model
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.trainers.kd.load import load_model
from peft_dynamic.trainers.kd.states import decoder_states, found_decoder
from peft_dynamic.trainers.kd.tasks import task_of

KINDS = ("logits", "states", "top_k")
DTYPES = ("bfloat16", "float32", "int8")
FORMAT = 1
SHARD = 2**26  # bytes after which a shard is written
_NO_TOKENS = ("attention_mask", "labels", "position_ids", "seq_idx")  # the last says which text of a flat batch


def cache_teacher(
    teacher: Any,
    batches: Iterable[Mapping[str, torch.Tensor]],
    folder: str | os.PathLike[str],
    kind: str | None = None,
    top_k: int = 64,
    dtype: str = "bfloat16",
    processing_class: Any = None,
) -> int:
    """Write what a teacher says of batches; rows that the folder has already are left out.

        settings = KDSFTConfig("out", kd_weight=0.5, max_steps=1, bf16=torch.cuda.is_available())
        trainer = KDSFTTrainer("small-model", None, settings, train_dataset=texts)
        cache_teacher("big-model", trainer.get_train_dataloader(), "cache")
        KDSFTTrainer("small-model", "cache:cache", settings, train_dataset=texts).train()

    Args:
        teacher: a model, or the path or name of one or of an adapter.
        batches: batches as the student will get them, "labels" among them where it is a causal model.
        folder: where; a folder that another teacher has filled is refused.
        kind: "logits" for classifiers; "states" or "top_k" for causal models. None for the first that fits.
        top_k: how many tokens of each position, with kind="top_k"; the rest are kept as one mass.
        dtype: of states: "bfloat16", "float32", or "int8" with a scale for each position.
        processing_class: the tokenizer, by which a student is compared; None for that of the path.

    Returns:
        How many rows were added.

    Raises:
        ValueError: a kind that does not go with the model, another teacher's folder, or rows whose targets would depend
            on more than their own tokens (an encoder-decoder's, a masked language model's).
    """
    model, tokenizer = (teacher, None) if isinstance(teacher, nn.Module) else load_model(teacher)
    task = task_of(model)
    kind = _check_kind(kind, task, top_k, dtype)
    meta = {
        "format": FORMAT,
        "kind": kind,
        "task": task,
        "dtype": dtype if kind == "states" else "float32",
        "top_k": top_k if kind == "top_k" else None,
        "teacher": fingerprint(model),
        "vocabulary": vocabulary_of(processing_class if processing_class is not None else tokenizer),
        "classes": base_model(model).config.num_labels if task == "sequence" else None,
        "width": None if task == "sequence" else base_model(model).config.get_text_config().vocab_size,
    }
    place = Path(folder)
    _begin(place, meta, model, kind)
    known, added = set(Cache(place).places), 0
    shard = _Shard(place)
    with evaluating(model):
        for batch in batches:
            keep = None if task == "sequence" else batch["labels"][:, 1:] != IGNORED
            rows = list(keyed_rows(batch, keep))
            if all(key in known or not count for key, count in rows):
                continue
            parts = _answers(model, batch, keep, kind, top_k, dtype, [count for _, count in rows])
            for (key, count), part in zip(rows, parts, strict=True):
                if count and key not in known:
                    shard.add(key, part)
                    known.add(key)
                    added += 1
    shard.write()
    return added


class Cache:
    """A folder that `cache_teacher` has filled.

    Args:
        folder: where it is.

    Raises:
        ValueError: it is none, or of another version.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / "meta.json"
        try:
            self.meta = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"teacher='cache:{self.folder}': there is no cache of a teacher. Fill it with cache_teacher."
            ) from error
        if self.meta.get("format") != FORMAT:
            raise ValueError(
                f"teacher='cache:{self.folder}' has the format {self.meta.get('format')!r}, and this version reads "
                f"{FORMAT}. Fill it anew with cache_teacher."
            )
        self.places: dict[str, tuple[Path, int, int]] = {}
        self._open: dict[Path, Any] = {}
        for shard in sorted(self.folder.glob("shard-*.safetensors")):
            with safe_open(shard, "pt") as file:
                start = 0
                for key, count in json.loads(file.metadata()["rows"]):
                    self.places[key] = (shard, start, start + count)
                    start += count
        head = self.folder / "head.safetensors"
        kept = load_file(head) if head.exists() else {}
        self.head = Head(kept["weight"], kept.get("bias"), self.meta["scale"], self.meta["softcap"]) if kept else None

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """What the teacher said of a row.

        Raises:
            ValueError: the row is not there.
        """
        if key not in self.places:
            raise ValueError(
                f"teacher='cache:{self.folder}' has nothing of a row in this batch: its tokens or labels are not those "
                f"that cache_teacher saw. It has {len(self.places)} rows. Fill it with these batches (it goes on where "
                "it was); rows that are drawn anew in each epoch, by masking or augmentation, need a model as teacher."
            )
        shard, start, end = self.places[key]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, "pt")
        file = self._open[shard]
        return {name: file.get_slice(name)[start:end] for name in file.keys()}  # noqa: SIM118  # safetensors' own

    def taught(self, keys: list[str], device: torch.device) -> States | TopK:
        """What `kd_losses` takes, of the labelled positions of several rows."""
        found = [self.read(key) for key in keys]
        joined = {name: torch.cat([part[name] for part in found]).to(device) for name in found[0]} if found else {}
        if self.meta["kind"] == "top_k":
            empty = torch.zeros(0, self.meta["top_k"], device=device)
            return TopK(joined.get("tokens", empty).long(), joined.get("values", empty).float())
        assert self.head is not None
        if self.head.weight.device != device:
            bias = None if self.head.bias is None else self.head.bias.to(device)
            self.head = self.head._replace(weight=self.head.weight.to(device), bias=bias)
        states = joined.get("values", self.head.weight.new_zeros(0, self.head.weight.shape[1]))
        if "scales" in joined:
            states = states.float() * joined["scales"].float()
        return States(states.to(self.head.weight.dtype), self.head)


def keyed_rows(inputs: Mapping[str, torch.Tensor], keep: torch.Tensor | None) -> Iterator[tuple[str, int]]:
    """The key of each row of a batch and how many positions it has; padding-free batches have a row per text.

    Args:
        inputs: the batch.
        keep: (B, T - 1) bool, the positions whose next token has a label; None for a classifier, with one each.
    """
    ids = inputs["input_ids"]
    columns = [ids, *(v for k, v in sorted(inputs.items()) if _is_column(k, v, ids))]
    mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
    taken = torch.zeros_like(ids, dtype=torch.bool)
    if keep is not None:
        taken[:, :-1] = keep
    for row in range(len(ids)):
        ends = [0, ids.shape[1]]
        if mask is None and places is not None:  # texts behind each other, each of which sees itself alone
            ends = [*(places[row] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        for start, end in pairwise(ends):
            part = slice(start, end)
            there = slice(None) if mask is None else mask[row, part].bool()
            digest = hashlib.blake2b(digest_size=16)
            for column in (*columns, taken):
                digest.update(column[row, part][there].cpu().long().numpy().tobytes())
            yield digest.hexdigest(), 1 if keep is None else int(taken[row, part].sum())


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights: all of small tensors, and of large ones their sum and every so many numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().flatten()
        step = max(1, flat.numel() // 4096)
        few = flat[::step].cpu()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(few.float().numpy().tobytes() if few.is_floating_point() else few.long().numpy().tobytes())
        if flat.is_floating_point() and flat.numel():
            digest.update(repr(float(flat.double().sum()) if flat.device.type == "cpu" else float(flat.sum())).encode())
    return digest.hexdigest()


def vocabulary_of(tokenizer: Any) -> str | None:
    """A hash of a tokenizer's tokens and their ids; None where there is none."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    return hashlib.blake2b(repr(sorted(tokenizer.get_vocab().items())).encode(), digest_size=16).hexdigest()


def _is_column(name: str, value: Any, ids: torch.Tensor) -> bool:
    return name not in (*_NO_TOKENS, "input_ids") and torch.is_tensor(value) and value.shape == ids.shape


def _check_kind(kind: str | None, task: str, top_k: int, dtype: str) -> str:
    fitting = {"sequence": ("logits",), "causal": ("states", "top_k")}.get(task)
    if fitting is None:
        raise ValueError(
            f"a {task} model's rows cannot be cached: their targets depend on more than their tokens. Pass the model "
            "itself as teacher."
        )
    kind = fitting[0] if kind is None else kind
    if kind not in fitting:
        raise ValueError(f"kind={kind!r}: of a {task} model it must be {' or '.join(map(repr, fitting))}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}.")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k={top_k!r}: must be a whole number of at least 1.")
    return kind


def _begin(place: Path, meta: dict[str, Any], model: Any, kind: str) -> None:
    """Write `meta.json` and the head, or see that the ones that are there are of this teacher."""
    path = place / "meta.json"
    if kind == "states":
        decoder = found_decoder(model)
        meta |= {"scale": decoder.logit_scale, "softcap": decoder.softcap}
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in meta if there.get(name) != meta[name]]
        if other:
            raise ValueError(
                f"folder={str(place)!r} holds a cache with another {', '.join(other)}: its rows would be mixed with "
                "this teacher's. Pass another folder, or delete that one first."
            )
        return
    if place.exists() and any(place.iterdir()):
        raise ValueError(f"folder={str(place)!r} is not empty and no cache of a teacher: pass another folder.")
    place.mkdir(parents=True, exist_ok=True)
    if kind == "states":
        head = {"weight": decoder.head.weight.detach().cpu().contiguous()}
        if decoder.head.bias is not None:
            head["bias"] = decoder.head.bias.detach().cpu().contiguous()
        save_file(head, place / "head.safetensors")
    path.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")  # last: a folder without it is no cache


def _answers(
    model: Any, batch: Mapping[str, Any], keep: Any, kind: str, top_k: int, dtype: str, counts: list[int]
) -> Iterator[dict[str, torch.Tensor]]:
    """What is kept of each row of a batch."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    inputs.pop("labels", None)
    if kind == "logits":
        yield from ({"values": row[None].float().cpu()} for row in model(**inputs).logits)
        return
    found = decoder_states(found_decoder(model), inputs, keep)
    start = 0
    for count in counts:
        states = found.states[start : start + count]
        start += count
        if kind == "top_k":
            best = torch.log_softmax(found.head.logits(states), 1).topk(min(top_k, len(found.head.weight)), 1)
            yield {"values": best.values.cpu(), "tokens": best.indices.int().cpu()}
        elif dtype == "int8":
            scales = states.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            yield {"values": (states.float() / scales).round().to(torch.int8).cpu(), "scales": scales.cpu()}
        else:
            yield {"values": states.to(getattr(torch, dtype)).cpu()}


class _Shard:
    """Rows that wait to be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[tuple[str, int]] = []
        self.parts: list[dict[str, torch.Tensor]] = []
        self.bytes = 0

    def add(self, key: str, part: dict[str, torch.Tensor]) -> None:
        self.rows.append((key, len(part["values"])))
        self.parts.append(part)
        self.bytes += sum(value.numel() * value.element_size() for value in part.values())
        if self.bytes >= SHARD:
            self.write()

    def write(self) -> None:
        if not self.rows:
            return
        number = len(list(self.folder.glob("shard-*.safetensors")))
        joined = {name: torch.cat([part[name] for part in self.parts]).contiguous() for name in self.parts[0]}
        path = self.folder / f"shard-{number:05d}.safetensors"
        unfinished = path.with_suffix(".part")
        save_file(joined, unfinished, {"rows": json.dumps(self.rows)})
        unfinished.replace(path)  # a fill that is stopped leaves no half shard
        self.rows, self.parts, self.bytes = [], [], 0
