"""What `classify` knows of labels: their names, the head that they need, and the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import typer
from transformers import AutoModelForSequenceClassification, set_seed


@dataclass(frozen=True)
class Labels:
    """The labels of a data set.

    Attributes:
        column: where they stand.
        names: their names in the order of their numbers; None for a regression.
    """

    column: str
    names: tuple[str, ...] | None

    @classmethod
    def of(cls, rows: Any, column: str) -> Labels:
        """The labels that the rows have.

        Raises:
            typer.BadParameter: the column is missing, or holds no labels.
        """
        if column not in (rows.column_names or []):
            raise typer.BadParameter(
                f"{column}: the rows have no such column; there are {', '.join(rows.column_names or [])}.",
                param_hint="--label_column",
            )
        if names := getattr((rows.features or {}).get(column), "names", None):  # a ClassLabel
            return cls(column, tuple(names))
        found = {*rows[column]} if hasattr(rows, "__len__") else {row[column] for row in rows}
        if all(isinstance(value, str) for value in found):
            return cls(column, tuple(sorted(found)))
        if all(isinstance(value, int) for value in found) and min(found) >= 0:
            return cls(column, tuple(map(str, range(max(found) + 1))))
        if all(isinstance(value, int | float) and value == value for value in found):
            return cls(column, None)
        wrong = next(value for value in found if not isinstance(value, int | float) or value != value)
        raise typer.BadParameter(
            f"{column} has {wrong!r} beside {len(found) - 1} other values: labels are names, whole numbers from 0, or "
            "numbers with a decimal point. Drop or mend that row.",
            param_hint="--label_column",
        )

    def number(self, value: Any) -> int | float:
        """A label as the model's loss takes it.

        Raises:
            typer.BadParameter: it is none of the training rows' labels.
        """
        if self.names is None:
            return float(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self.names):
            return value
        if value in self.names:
            return self.names.index(value)
        raise typer.BadParameter(
            f"{value!r} is no label of the training rows, which have {', '.join(self.names)}.",
            param_hint="--label_column",
        )

    def encoded(self, rows: Any, columns: list[str], tokenizer: Any, max_length: int) -> Any:
        """The rows as the tokenizer gives them, with `labels`."""

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            found = tokenizer(*(row[column] for column in columns), truncation=True, max_length=max_length)
            return {**found, "labels": self.number(row[self.column])}

        return rows.map(encode, remove_columns=rows.column_names)

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Accuracy and macro F1, of a regression the correlation and the squared error."""
        outputs = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        wanted = np.asarray(prediction.label_ids)
        if self.names is None:
            values = np.asarray(outputs, dtype=np.float64).reshape(-1)
            flat = len(values) < 2 or not values.std() or not wanted.std()
            pearson = float("nan") if flat else float(np.corrcoef(values, wanted)[0, 1])
            return {"pearson": pearson, "mse": float(np.mean((values - wanted) ** 2))}
        chosen = np.asarray(outputs).argmax(-1)
        scores = []
        for label in np.unique(np.concatenate([chosen, wanted])):
            right = float(((chosen == label) & (wanted == label)).sum())
            scores.append(2 * right / float((chosen == label).sum() + (wanted == label).sum()))
        return {"accuracy": float((chosen == wanted).mean()), "f1": float(np.mean(scores))}


def text_columns(rows: Any, named: str | None, label: str) -> list[str]:
    """The one or two columns of text.

    Raises:
        typer.BadParameter: there are more, or none.
    """
    first = next(iter(rows))
    columns = [name for name, value in first.items() if isinstance(value, str) and name != label]
    if named is not None:
        columns = [name.strip() for name in named.split(",")]
        if missing := [name for name in columns if not isinstance(first.get(name), str)]:
            raise typer.BadParameter(
                f"{missing[0]}: the rows have no such column of text; there are {', '.join(first)}.",
                param_hint="--text_columns",
            )
    if len(columns) not in (1, 2):
        raise typer.BadParameter(
            f"a classifier takes one text or two, and the columns of text are {', '.join(columns) or 'none'}. Name "
            "yours, as --text_columns question,answer.",
            param_hint="--text_columns",
        )
    return columns


def load(name: str, labels: Labels, tokenizer: Any, seed: int, settings: dict[str, Any]) -> tuple[Any, list[str]]:
    """The base model under a head for these labels, which starts at random by the seed.

    Returns:
        The model, and the modules that the checkpoint has no weights for.
    """
    set_seed(seed)
    heads: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels.names is not None:
        heads = {"id2label": dict(enumerate(labels.names)), "label2id": {n: i for i, n in enumerate(labels.names)}}
    settings = {key: value for key, value in settings.items() if value is not None}
    model, found = AutoModelForSequenceClassification.from_pretrained(
        name, output_loading_info=True, **heads, **settings
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:  # a decoder's head reads the last token that is no padding
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, _modules_of(model, {*found["missing_keys"]})


def check_ends(config: Any, rows: Any, tokenizer: Any) -> None:
    """Stop where an encoder-decoder's head would not find the one token that ends each text, which it reads.

    Args:
        config: the model's.
        rows: as the tokenizer gives them; the first hundred are looked at.
        tokenizer: whose padding must be another token.

    Raises:
        typer.BadParameter: it would not.
    """
    if not config.is_encoder_decoder:
        return
    end = config.get_text_config().eos_token_id
    found = {row["input_ids"].count(end) for row in islice(rows, 100)}
    if len(found) == 1 and found != {0} and tokenizer.pad_token_id != end:
        return
    wrong = (
        f"pads with it ({tokenizer.pad_token!r})"
        if tokenizer.pad_token_id == end
        else f"writes {' or '.join(map(str, sorted(found)))} of them in a text"
    )
    raise typer.BadParameter(
        f"the head of a {config.model_type} reads the token that ends a text (number {end}), and the tokenizer {wrong}"
        ". Pass a model whose tokenizer ends each text with it and pads with another.",
        param_hint="--model_name_or_path",
    )


def _modules_of(model: Any, keys: set[str]) -> list[str]:
    """The outermost modules all of whose parameters are among these."""
    modules: list[str] = []
    for name, module in model.named_modules():
        inside = {f"{name}.{each}" for each, _ in module.named_parameters()}
        if name and inside and inside <= keys and not name.startswith(tuple(f"{each}." for each in modules)):
            modules.append(name)
    return modules


def save_random(config: Any, modules: list[str]) -> None:
    """Have an adapter train and save modules that start at random, where PEFT's rule for SEQ_CLS passes them by.

    Args:
        config: the adapter's, which is changed.
        modules: as `load` returns them.

    Raises:
        typer.BadParameter: the adapter cannot save modules.
    """
    passed_by = [name for name in modules if not name.endswith(("classifier", "score"))]
    if not passed_by:
        return
    if not hasattr(config, "modules_to_save"):
        raise typer.BadParameter(
            f"{config.peft_type.value.lower()} cannot save {passed_by[0]}, of which the base model has no weights: it "
            "would be random in the saved adapter. Pass an adapter with modules_to_save, such as lora.",
            param_hint="--adapter",
        )
    config.modules_to_save = [*dict.fromkeys([*(config.modules_to_save or []), *passed_by])]


def measured(trainer: Any, model: Any) -> dict[str, float]:
    """The loss and the metrics of the evaluation rows, with the model as it is now."""
    found = trainer.evaluation_loop(
        trainer.get_eval_dataloader(), "Evaluation", prediction_loss_only=False, metric_key_prefix="eval"
    ).metrics
    return {
        name.removeprefix("eval_"): value
        for name, value in found.items()
        if name.removeprefix("eval_") in ("loss", "accuracy", "f1", "pearson", "mse")
    }
