"""Judges of support: does a premise (passages) entail a hypothesis (a sentence)?

Notable: a judge is any callable (premises, hypotheses) -> one number in [0, 1], or truth value, for each pair; 0.5 and
above is support. `EntailmentModel` makes one of a transformers model, `EntailmentCache` keeps what a judge has said.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its types are a package of their own

from peft_dynamic.hosts.modes import eval_mode

Judge = Callable[[Sequence[str], Sequence[str]], Sequence[float]]

TRUE_MODEL = "google/t5_xxl_true_nli_mixture"  # the judge of ALCE's published scores
TRUE_TEMPLATE = "premise: {premise} hypothesis: {hypothesis}"
TRUE_ANSWERS = ("1", "0")
_SUPPORT_LABELS = ("entailment", "entail", "entails", "supported", "attributable")


class EntailmentModel:
    """A transformers model as a judge: how likely each premise is to support its hypothesis.

    A sequence classifier reads the pair, and the probability is that of its class of entailment. An encoder-decoder is
    asked as TRUE is: it reads "premise: ... hypothesis: ..." and supports what it answers "1" to (greedy, as ALCE
    decodes it); its probability is that of "1" against "0" in the first step. Others, FLAN for one, understand another
    `template` and other `answers`.

    A pair that is too long loses the end of its premise, never of its hypothesis; `truncated` counts these pairs.

    Args:
        model: the name or folder of a model, or a loaded model (with `tokenizer`).
        tokenizer: the loaded model's.
        max_length: of a pair, in tokens. None is what the model has positions for; a T5 then reads everything.
        batch_size: pairs to a batch; pairs of like length go together.
        support_label: the class that means support, by name or index. None finds the one that is named entailment,
            supported or attributable.
        template: what an encoder-decoder reads, with {premise} and then {hypothesis}. None is what its configuration
            has as `entailment_template`, and else TRUE's.
        answers: what it says for support and for none. None is what its configuration has as `entailment_answers`, and
            else TRUE's "1" and "0".
        dtype: to load the weights in, for a `model` that is given by name. bfloat16 is what ALCE loads TRUE in.
        device: where to run. None is a GPU if there is one, and where a loaded model is.
        name: stands in the names of the scores. None is the last part of the model's own name.

    Raises:
        ValueError: the model is of neither kind, or has no class of that name.

    Source: Honovich et al., "TRUE: Re-evaluating Factual Consistency Evaluation" (2022, arXiv:2204.04991); Gao et al.,
    "Enabling Large Language Models to Generate Text with Citations" (2023, arXiv:2305.14627), whose script was read.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        batch_size: int = 32,
        support_label: str | int | None = None,
        template: str | None = None,
        answers: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        name: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        if isinstance(model, (str, PathLike)):
            model, tokenizer = _load(model, tokenizer, dtype)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        elif tokenizer is None:
            raise ValueError("tokenizer is None; a loaded model needs its tokenizer too")
        self.model = model.eval() if device is None else model.eval().to(device)
        self.tokenizer = tokenizer
        self.generates = bool(model.config.is_encoder_decoder)
        self.support_index = None if self.generates else _support_index(model.config, support_label)
        own: dict[str, Any] = model.config.to_dict()
        self.template: str = template or own.get("entailment_template", TRUE_TEMPLATE)
        self.answers = tuple(answers or own.get("entailment_answers", TRUE_ANSWERS))
        if not re.fullmatch(r"[^{}]*\{premise\}[^{}]*\{hypothesis\}[^{}]*", self.template):
            raise ValueError(
                f"template is {self.template!r}; it must have {{premise}} and then {{hypothesis}}, each once"
            )
        if self.generates and (len(self.answers) != 2 or len({*self._first_tokens()}) != 2):
            raise ValueError(f"answers are {self.answers}; they must be two that begin with different tokens")
        positions = getattr(model.config, "max_position_embeddings", None)
        # A tokenizer of no known length says 10**30. A T5's says 512, but a T5 reads any length.
        known = [n for n in (positions, tokenizer.model_max_length) if n is not None and n < 10**9]
        self.max_length = max_length or (None if self.generates or not known else min(known))
        self.batch_size = batch_size
        self.name = name or Path(str(getattr(model.config, "name_or_path", "") or type(model).__name__)).name
        # ALCE shortens nothing.
        as_alce = (self.template, self.answers, self.max_length) == (TRUE_TEMPLATE, TRUE_ANSWERS, None)
        self.comparable = getattr(model.config, "name_or_path", None) == TRUE_MODEL and as_alce
        self.truncated = 0

    def fingerprint(self) -> str:
        """What tells this judge's answers from another's: a hash of a sample of the weights and of the limits."""
        limits = (type(self.model).__name__, self.max_length, self.support_index, self.template, self.answers)
        digest = hashlib.sha256(repr(limits).encode())
        for key, value in sorted(self.model.state_dict().items()):
            sample = value.detach().flatten()[:: max(1, value.numel() // 64)].float().cpu()
            digest.update(key.encode() + sample.numpy().tobytes())
        return digest.hexdigest()

    @torch.inference_mode()
    def __call__(self, premises: Sequence[str], hypotheses: Sequence[str], *, progress: bool = False) -> list[float]:
        """The probability of support of each pair."""
        encoded = [self.encode(*pair) for pair in zip(premises, hypotheses, strict=True)]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
        probabilities = [0.0] * len(encoded)
        bar = tqdm(total=len(order), desc="entailment", unit="pair", disable=not progress)
        with bar, eval_mode(self.model):
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                batch = self.tokenizer.pad([encoded[i] for i in chosen], return_tensors="pt").to(self.model.device)
                for i, probability in zip(chosen, self._judge(batch), strict=True):
                    probabilities[i] = probability
                bar.update(len(chosen))
        return probabilities

    def encode(self, premise: str, hypothesis: str) -> dict[str, list[int]]:
        """The tokens of a pair, as the model reads it; the end of a premise that is too long is not in them."""
        if self.generates:
            # Not str.format: texts may have braces.
            before, after = self.template.split("{premise}")
            rest_text = after.replace("{hypothesis}", hypothesis)
            encoded = self.tokenizer(before + premise + rest_text, verbose=False)
            if self.max_length is None or len(encoded["input_ids"]) <= self.max_length:
                return dict(encoded)
            self.truncated += 1
            rest = self.tokenizer(rest_text, verbose=False)["input_ids"]
            start = self.tokenizer(before + premise, add_special_tokens=False, verbose=False)["input_ids"]
            ids = start[: self._room(len(rest), hypothesis)] + rest
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        encoded = self.tokenizer(premise, hypothesis, verbose=False)
        if self.max_length is None or len(encoded["input_ids"]) <= self.max_length:
            return dict(encoded)
        self.truncated += 1
        self._room(len(self.tokenizer("", hypothesis, verbose=False)["input_ids"]), hypothesis)
        return dict(self.tokenizer(premise, hypothesis, truncation="only_first", max_length=self.max_length))

    def _first_tokens(self) -> list[int]:
        return [self.tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in self.answers]

    def _room(self, taken: int, hypothesis: str) -> int:
        """Tokens that are left for the premise."""
        assert self.max_length is not None
        if taken >= self.max_length:
            raise ValueError(
                f"a hypothesis of {taken} tokens leaves no room for a premise in max_length={self.max_length}: "
                f"{hypothesis[:80]!r}...; raise max_length or take a judge that reads more"
            )
        return self.max_length - taken

    def _judge(self, batch: Any) -> list[float]:
        if not self.generates:
            return self.model(**batch).logits.float().softmax(-1)[:, self.support_index].tolist()
        made = self.model.generate(
            **batch, max_new_tokens=10, do_sample=False, num_beams=1, output_scores=True, return_dict_in_generate=True
        )
        supported = [
            text == self.answers[0] for text in self.tokenizer.batch_decode(made.sequences, skip_special_tokens=True)
        ]
        likely = made.scores[0].float()[:, self._first_tokens()].softmax(-1)[:, 0].tolist()
        # Where the answer is neither, it is no support, whatever the two would say.
        return [p if (p >= 0.5) == answer else float(answer) for p, answer in zip(likely, supported, strict=True)]


class EntailmentCache:
    """A judge that asks another one each pair once, and keeps the answers, on disk too where it is given a file.

    Args:
        judge: an `EntailmentModel`, or a callable (premises, hypotheses) -> numbers in [0, 1] or truth values.
        path: a file of JSON lines that answers are read from and added to. The key of an answer has the judge's
            fingerprint in it, so that one judge's answers are never taken for another's.
        fingerprint: for a `judge` that is a plain callable: a text to tell its answers by. It is on you to change it
            when the judge changes.

    Raises:
        ValueError: a path for a judge without a fingerprint.
    """

    def __init__(self, judge: Judge, path: str | PathLike[str] | None = None, fingerprint: str | None = None) -> None:
        own = getattr(judge, "fingerprint", None)
        if path is not None and fingerprint is None and own is None:
            raise ValueError(
                "path is given, but the judge is a plain callable: nothing tells its answers from another's. Give "
                "fingerprint='a name and a version' too"
            )
        self.judge = judge
        self.path = None if path is None else Path(path)
        self.asked = 0
        self._prefix = fingerprint or (own() if callable(own) and path is not None else "")
        self._known: dict[str, float] = {}
        if self.path is not None and self.path.is_file():
            with self.path.open(encoding="utf-8") as lines:
                for line in lines:
                    try:
                        key, answer = json.loads(line)
                    except ValueError:
                        continue  # cut off, by the end of a process: it is asked again
                    self._known[key] = answer

    def __call__(self, premises: Sequence[str], hypotheses: Sequence[str], *, progress: bool = False) -> list[float]:
        """The probability of support of each pair."""
        keys = [self._key(*pair) for pair in zip(premises, hypotheses, strict=True)]
        new = {
            key: pair
            for key, pair in zip(keys, zip(premises, hypotheses, strict=True), strict=True)
            if key not in self._known
        }
        if new:
            extra = {"progress": True} if progress and isinstance(self.judge, EntailmentModel) else {}
            pairs = list(new.values())
            answers = self.judge([premise for premise, _ in pairs], [hypothesis for _, hypothesis in pairs], **extra)
            self.asked += len(new)
            self._keep(list(new), probabilities(answers, len(new)))
        return [self._known[key] for key in keys]

    def _key(self, premise: str, hypothesis: str) -> str:
        return hashlib.sha256(json.dumps([self._prefix, premise, hypothesis]).encode()).hexdigest()

    def _keep(self, keys: list[str], answers: list[float]) -> None:
        self._known.update(zip(keys, answers, strict=True))
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as lines:
            # The line break comes first: the last line may have been cut off.
            lines.writelines("\n" + json.dumps(pair) for pair in zip(keys, answers, strict=True))


def probabilities(answers: Sequence[float], expected: int) -> list[float]:
    """A judge's answers as numbers, once they are seen to be one for each pair and in [0, 1]."""
    values = answers.tolist() if hasattr(answers, "tolist") else list(answers)
    if len(values) != expected:
        raise ValueError(f"the judge gave {len(values)} answers for {expected} pairs; it must give one for each")
    for value in values:
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
            raise ValueError(f"the judge answered {value!r}; it must be a truth value or a number from 0 to 1")
    return [float(value) for value in values]


def measure_entailment(
    judge: Judge, premises: Sequence[str], hypotheses: Sequence[str], labels: Sequence[bool]
) -> dict[str, float]:
    """What a judge is worth on labelled pairs.

    Args:
        judge: a callable (premises, hypotheses) -> numbers in [0, 1].
        premises: texts.
        hypotheses: texts, as many.
        labels: whether the premise supports the hypothesis, for each pair; both must occur.

    Returns:
        `auc`, the area under the ROC curve: the share of (supported, not supported) couples that the judge puts in the
        right order, ties counting half. `balanced_accuracy` at 0.5: the mean of the shares of supported pairs that it
        calls supported, and of others that it does not. `rows`, how many pairs.
    """
    scores = torch.tensor(probabilities(judge(premises, hypotheses), len(labels)), dtype=torch.float64)
    supported = torch.tensor([bool(label) for label in labels])
    yes, no = scores[supported], scores[~supported]
    if not len(yes) or not len(no):
        raise ValueError(f"{len(yes)} of {len(labels)} labels are support; both kinds are needed to measure a judge")
    below = torch.searchsorted(no.sort().values, yes, side="left")
    below_or_equal = torch.searchsorted(no.sort().values, yes, side="right")
    return {
        "auc": ((below + below_or_equal).double().mean() / (2 * len(no))).item(),
        "balanced_accuracy": (((yes >= 0.5).double().mean() + (no < 0.5).double().mean()) / 2).item(),
        "rows": len(labels),
    }


def _load(name: str | PathLike[str], tokenizer: Any, dtype: torch.dtype | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

    config = AutoConfig.from_pretrained(name)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForSequenceClassification
    if not config.is_encoder_decoder and not any("Classification" in kind for kind in config.architectures or []):
        raise ValueError(
            f"entailment={str(name)!r} is a {config.architectures}, whose classifier would be drawn at random; a judge "
            "is a trained sequence classifier or an encoder-decoder"
        )
    model = auto.from_pretrained(name, dtype=dtype or torch.float32)
    return model, tokenizer or AutoTokenizer.from_pretrained(name)


def _support_index(config: Any, label: str | int | None) -> int:
    names = {str(name).lower(): int(i) for i, name in config.id2label.items()}
    if isinstance(label, int):
        if label not in names.values():
            raise ValueError(f"support_label={label} is no class of the model, whose classes are {names}")
        return label
    wanted = _SUPPORT_LABELS if label is None else (label.lower(),)
    found = [names[name] for name in wanted if name in names]
    if not found:
        raise ValueError(
            f"none of the model's classes {names} is called {' or '.join(wanted)}; say which one means support with "
            "support_label=NAME or its index"
        )
    return found[0]
