"""The official metrics of GLUE and SuperGLUE, by scikit-learn and scipy, and a model's answers scored by them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from importlib import import_module
from typing import Any

import torch

from peft_dynamic._extras import how_to_install
from peft_dynamic.hosts.modes import eval_mode
from peft_dynamic.hosts.quantization import unpack_bnb_4bit
from peft_dynamic.trainers.rewards.nlu import nlu_parse, nlu_prompt
from peft_dynamic.trainers.rewards.nlu_tasks import HIGHEST_SIMILARITY, NLUTask, Row, task_named

Predictions = Sequence[int | float | None]


def evaluate_nlu(
    model: Any,
    tokenizer: Any,
    task: str,
    rows: Sequence[Row],
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    chain_of_thought: bool = False,
    chat: bool = False,
    shots: Sequence[Row] = (),
) -> dict[str, float]:
    """Ask a model the rows of a task, greedily and in batches, and score what it answers.

    The paper samples its answers, and puts a random label in the place of one that cannot be read, which gives a model
    that answers nothing the score of a coin. Here such an answer is wrong, and the share of them is reported.

    Args:
        model: a causal language model, with or without an adapter. Its mode is put back afterwards.
        tokenizer: its tokenizer; padding is on the left here, whatever it is set to.
        task: as for `nlu_prompt`.
        rows: labelled rows; for record all those that `record_rows(row)` makes of each query.
        batch_size: prompts at a time.
        max_new_tokens: of an answer; None for 16, or 256 with a chain of thought.
        chain_of_thought: as for `nlu_prompt`, and as it was trained.
        chat: use the tokenizer's chat template.
        shots: labelled rows to show before each question.

    Returns:
        The task's official metrics, `score` (their mean) and `unparsable` (a share), all as `nlu_metrics` has them.

    Raises:
        ValueError: no rows, a row that does not fit the task, or a tokenizer without padding.
        ImportError: without scikit-learn or scipy.
    """
    of = task_named(task)
    _need_libraries()
    for row in rows:  # before the time is spent
        of.gold(row.get("label"))
    prompts: list[Any] = [nlu_prompt(task, row, chain_of_thought, chat, shots) for row in rows]
    if chat:
        prompts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    limit = max_new_tokens or (256 if chain_of_thought else 16)
    completions = generate_answers(model, tokenizer, prompts, batch_size, limit, special=not chat)
    return nlu_metrics(task, [nlu_parse(task, text, chain_of_thought) for text in completions], rows)


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: Any, prompts: list[str], batch_size: int, limit: int, special: bool
) -> list[str]:
    """A greedy continuation of each prompt; prompts of like length go together."""
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer: it has no padding token. Set tokenizer.pad_token = tokenizer.eos_token.")
    ids = tokenizer(prompts, add_special_tokens=special)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    completions = [""] * len(ids)
    unpack_bnb_4bit(model)  # it may be trained after this
    # All that generation_config.json may ask of sampling is off, or generate() would warn of it.
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "max_new_tokens": limit}
    with eval_mode(model):
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in some]}, padding_side="left", return_tensors="pt")
            batch = batch.to(model.device)
            tokens = model.generate(**batch, **greedy, pad_token_id=tokenizer.pad_token_id)
            answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, answer in zip(some, answers, strict=True):
                completions[i] = answer
    return completions


def nlu_metrics(task: str, predictions: Predictions, rows: Sequence[Row]) -> dict[str, float]:
    """The official metrics of a task.

    A prediction of None is wrong. In a task of two classes it counts as the other one, of three as a class that no row
    has. For STS-B it counts as 0 or 5, whichever is farther from the label.

    - cola, ax: `matthews_correlation`; 0 where it is not defined.
    - stsb: `pearson` and `spearmanr`; 0 where all predictions are equal.
    - mrpc, qqp: `accuracy` and the `f1` of class 1.
    - cb: `accuracy` and `f1_macro`, over the classes among the labels and predictions.
    - multirc: `f1_a`, F1 of "True" over all answers; `question_exact_match`, the questions with all answers right.
    - record: the first entity of a query that is judged right is its answer. `token_f1` and `entity_exact_match`
      compare it with each right answer, case, punctuation and articles aside, and take the best; 0 without one.
    - all others: `accuracy`.

    Args:
        task: as for `nlu_prompt`.
        predictions: labels as `nlu_parse` returns them, one a row.
        rows: the labelled rows.

    Returns:
        Those metrics as fractions, `score` (their mean) and `unparsable` (the share of predictions that are None).

    Raises:
        ValueError: no rows, another number of predictions, or a label that is not the task's.
        ImportError: without scikit-learn or scipy.
    """
    of = task_named(task)
    _need_libraries()
    if not rows or len(predictions) != len(rows):
        raise ValueError(
            f"rows: there are {len(rows)} for {len(predictions)} predictions; must be as many, at least 1."
        )
    gold = [of.gold(row.get("label")) for row in rows]
    filled = [_wrong(of, label) if p is None else p for p, label in zip(predictions, gold, strict=True)]
    values = {name: METRICS[name](filled, gold, rows) for name in of.metrics}
    unparsable = sum(p is None for p in predictions) / len(rows)
    return {**values, "score": sum(values.values()) / len(values), "unparsable": unparsable}


def _wrong(task: NLUTask, label: float) -> float:
    if not task.words:
        return 0.0 if label > HIGHEST_SIMILARITY / 2 else HIGHEST_SIMILARITY
    return 1 - label if len(task.words) == 2 else -1


Numbers = Sequence[float]
Metric = Callable[[Numbers, Numbers, Sequence[Row]], float]


def _need_libraries() -> None:
    """Raise before time is spent."""
    try:
        for library in ("scipy.stats", "sklearn.metrics"):
            import_module(library)
    except ImportError as error:
        raise ImportError(
            "The metrics of GLUE and SuperGLUE need scikit-learn and scipy. "
            + how_to_install("nlu", "scikit-learn", "scipy")
        ) from error


def _accuracy(predicted: Numbers, gold: Numbers, rows: Sequence[Row]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(gold, predicted))


def _f1(predicted: Numbers, gold: Numbers, rows: Sequence[Row]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, zero_division=0.0))


def _f1_macro(predicted: Numbers, gold: Numbers, rows: Sequence[Row]) -> float:
    from sklearn.metrics import f1_score

    kinds = sorted({*predicted, *gold} - {-1})
    return float(f1_score(gold, predicted, labels=kinds, average="macro", zero_division=0.0))


def _matthews(predicted: Numbers, gold: Numbers, rows: Sequence[Row]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(gold, predicted)) if len({*gold, *predicted}) > 1 else 0.0


def _pearson(predicted: Numbers, gold: Numbers, rows: Sequence[Row]) -> float:
    from scipy.stats import pearsonr

    return float(pearsonr(predicted, gold).statistic) if _vary(predicted, gold) else 0.0


def _spearman(predicted: Numbers, gold: Numbers, rows: Sequence[Row]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(predicted, gold).statistic) if _vary(predicted, gold) else 0.0


def _vary(*columns: Numbers) -> bool:
    return all(len(set(column)) > 1 for column in columns)


def _grouped(rows: Sequence[Row], columns: tuple[str, ...]) -> list[list[int]]:
    """The positions of the rows with equal text in these columns."""
    groups: dict[Hashable, list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault(tuple(row[column] for column in columns), []).append(position)
    return list(groups.values())


def _question_exact_match(predicted: Numbers, gold: Numbers, rows: Sequence[Row]) -> float:
    questions = _grouped(rows, ("paragraph", "question"))
    return sum(all(predicted[i] == gold[i] for i in question) for question in questions) / len(questions)


def _over_queries(score: Callable[[list[str], list[str]], float]) -> Metric:
    """The mean over ReCoRD's queries of the best `score` of the words of the answer and of a right one."""

    def metric(predicted: Numbers, gold: Numbers, rows: Sequence[Row]) -> float:
        queries = _grouped(rows, ("passage", "query"))
        total = 0.0
        for query in queries:
            answer = next((rows[i]["entity"] for i in query if predicted[i] == 1), None)
            if answer is not None:
                total += max((score(_words(answer), _words(right)) for right in rows[query[0]]["answers"]), default=0.0)
        return total / len(queries)

    return metric


def _words(text: str) -> list[str]:
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _overlap(answer: list[str], right: list[str]) -> float:
    shared = sum((Counter(answer) & Counter(right)).values())
    return 2 * shared / (len(answer) + len(right)) if shared else 0.0


METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_a": _f1,
    "f1_macro": _f1_macro,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
    "question_exact_match": _question_exact_match,
    "token_f1": _over_queries(_overlap),
    "entity_exact_match": _over_queries(lambda answer, right: float(answer == right)),
}
