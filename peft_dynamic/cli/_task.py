"""Rows that an adapter is run on: text for a causal language model, or labelled rows for a classifier.

Notable: what can be seen in the rows alone is seen when a task is made, and nothing is imported for it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import typer

from peft_dynamic.cli import _identity
from peft_dynamic.cli._data import Columns, read_rows, to_examples, unused_columns
from peft_dynamic.cli._edge import UserError
from peft_dynamic.cli._encode import encode_and_tell
from peft_dynamic.cli._given import require
from peft_dynamic.cli._labels import numbered, to_labelled

T = TypeVar("T")
Evaluate = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class RowOptions:
    """The options that say which rows, and how they are read."""

    data: str
    columns: Columns
    label: str
    rows: int | None
    max_length: int
    batch_size: int

    def __post_init__(self) -> None:
        require(self.rows is None or self.rows >= 1, "--rows", self.rows, "at least 1")
        require(self.max_length >= 8, "--max-length", self.max_length, "at least 8 tokens")
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")

    def identity(self, rows: int, digest: str) -> dict[str, Any]:
        """What tells these rows, and how they are read, from others."""
        lengths = {"max_length": self.max_length, "batch_size": self.batch_size}
        return {"rows": rows, "sha256": digest[:16], **lengths}

    def some(self, examples: list[T]) -> list[T]:
        """As many as are wanted, from all over the file: it may be sorted."""
        if self.rows is None or self.rows >= len(examples):
            return examples
        return random.Random(0).sample(examples, self.rows)


def task_for(written: dict[str, Any], given: RowOptions, adapter: str) -> TextTask | LabelTask:
    """The task of an adapter, with its rows.

    Args:
        written: the adapter's configuration, as its file has it.
        given: the options.
        adapter: what messages call it.

    Raises:
        typer.BadParameter: the adapter is of another kind of model, or the rows are none for it.
    """
    return _task_of(written, adapter)(given)


def check_same_task(written: dict[str, Any], task: TextTask | LabelTask, adapter: str) -> None:
    """Stop where another adapter is of another kind of model than the first one, whose rows are read."""
    if not isinstance(task, _task_of(written, adapter)):
        raise typer.BadParameter(
            f"{adapter} is of another kind of model than the first adapter; a classifier and a language model have no "
            "score in common.",
            param_hint="ADAPTERS",
        )


def _task_of(written: dict[str, Any], adapter: str) -> type[TextTask] | type[LabelTask]:
    kind = _kind(written)
    if kind is None or kind.endswith(CAUSAL):
        return TextTask
    if kind.endswith(("SEQ_CLS", "ForSequenceClassification")):
        return LabelTask
    raise typer.BadParameter(
        f"{adapter} is of a model for {kind}; the command runs causal language models and classifiers (SEQ_CLS). Use "
        "peft_dynamic.rank_curve and adapter_moments in Python.",
        param_hint="ADAPTER",
    )


CAUSAL = ("CAUSAL_LM", "ForCausalLM", "LMHeadModel")


def _kind(written: dict[str, Any]) -> str | None:
    """The task or the class of the model that an adapter's configuration names."""
    noted = written.get("auto_mapping")
    kind = written.get("task_type") or (noted.get("base_model_class") if isinstance(noted, dict) else None)
    return None if kind is None else str(kind)


def require_causal(written: dict[str, Any], adapter: str) -> None:
    """Stop unless an adapter may be of a model that writes text.

    Raises:
        typer.BadParameter: it is of another kind.
    """
    kind = _kind(written)
    if kind is not None and not kind.endswith(CAUSAL):
        raise typer.BadParameter(
            f"{adapter} is of a model for {kind}, which answers nothing. Pass an adapter of a causal language model.",
            param_hint="OUT",
        )


class TextTask:
    """Rows as `peft-dynamic train` takes them: the loss is that of the tokens which training would learn."""

    metrics = ("loss", "perplexity")

    def __init__(self, given: RowOptions) -> None:
        self.given = given
        rows = read_rows(given.data, "--data")
        self.examples = given.some(to_examples(rows, given.columns, given.data, "--data"))
        self.unused = unused_columns(rows, given.columns)

    def identity(self) -> dict[str, Any]:
        """What tells these rows from others."""
        return self.given.identity(len(self.examples), _identity.digest(self.examples))

    def load_base(self, name: str, dtype: Any, settings: dict[str, Any], others: dict[str, Any]) -> Any:
        """The base model."""
        from peft_dynamic.cli._load import load_decoder

        return load_decoder(name, dtype, settings)

    def batches(self, model: Any, tokenizer: Any) -> tuple[list[Any], list[str]]:
        """Padded batches with labels, and what was left out."""
        from peft_dynamic.cli._measure import batches

        encoded, notes = encode_and_tell(self.examples, tokenizer, self.given.max_length, "--data")
        return batches(encoded, tokenizer, self.given.batch_size, 0), notes

    def evaluate(self, batches: list[Any], dtype: Any) -> Evaluate:
        """What `rank_curve` calls."""
        from peft_dynamic.cli._measure import text_metrics

        return lambda model: text_metrics(model, batches, dtype)


class LabelTask:
    """Rows of a classifier: one text or two, and a label."""

    metrics = ("accuracy", "loss", "mse")

    def __init__(self, given: RowOptions) -> None:
        if given.columns.instruction:
            raise typer.BadParameter("a classifier has no prompts to put it before.", param_hint="--instruction")
        self.given = given
        rows = read_rows(given.data, "--data")
        found, columns = to_labelled(rows, given.columns.text, given.label, given.data, "--data")
        self.examples = given.some(found)
        self.unused = [key for key in rows[0] if key not in (*columns, given.label)]

    def identity(self) -> dict[str, Any]:
        """What tells these rows from others."""
        text = json.dumps([[example.texts, example.label] for example in self.examples])
        return self.given.identity(len(self.examples), hashlib.sha256(text.encode()).hexdigest())

    def load_base(self, name: str, dtype: Any, settings: dict[str, Any], others: dict[str, Any]) -> Any:
        """The base model, with as many outputs as the adapter's head has."""
        from peft_dynamic.cli._load import load_classifier

        return load_classifier(name, dtype, settings, others)

    def batches(self, model: Any, tokenizer: Any) -> tuple[list[Any], list[str]]:
        """Padded batches with labels, and what was left out."""
        from peft_dynamic.cli._measure import batches

        encoded, collator = self.encoded(model, tokenizer)
        return batches(encoded, tokenizer, self.given.batch_size, 0, collator), []

    def encoded(self, model: Any, tokenizer: Any) -> tuple[list[dict[str, Any]], Any]:
        """The rows as tokens with their labels, and what pads them."""
        from transformers import DataCollatorWithPadding

        if model.config.pad_token_id is None:  # a decoder's classifier looks for the last token that is no padding
            model.config.pad_token_id = tokenizer.pad_token_id
        known = {name: i for name, i in (model.config.label2id or {}).items() if not name.startswith("LABEL_")}
        labels = numbered(self.examples, known, model.config.num_labels, "--data")
        limit = min(self.given.max_length, tokenizer.model_max_length)
        encoded = [
            {**tokenizer(*example.texts, truncation=True, max_length=limit), "labels": label}
            for example, label in zip(self.examples, labels, strict=True)
        ]
        if not any(row["input_ids"] for row in encoded):
            raise UserError("--data: no row has a token. Pass rows with text.")
        return encoded, DataCollatorWithPadding(tokenizer)

    def evaluate(self, batches: list[Any], dtype: Any) -> Evaluate:
        """What `rank_curve` calls."""
        from peft_dynamic.cli._measure import label_metrics

        return lambda model: label_metrics(model, batches, dtype)
