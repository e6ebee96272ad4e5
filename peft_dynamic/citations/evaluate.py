"""ALCE's evaluation of cited answers, with any judge of entailment: `evaluate_citations`.

Notable: the judge is asked in three rounds (all citations of a sentence together, each alone, all but each), each round
one batch over all answers, and only for what the round before left open. A score is named as published ones are only if
it was made as they were; otherwise its name says in brackets what was different.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from peft_dynamic._extras import how_to_install
from peft_dynamic.citations import metrics
from peft_dynamic.citations.answers import Answer, Sentence
from peft_dynamic.citations.entailment import TRUE_MODEL, EntailmentCache, EntailmentModel, Judge
from peft_dynamic.citations.metrics import Splitter
from peft_dynamic.citations.result import CitationEvaluation
from peft_dynamic.citations.rows import Row, read_rows
from peft_dynamic.citations.text import find_citations, normalise_citations

ALCE_MAX_CITATIONS = 3


def evaluate_citations(
    rows: Iterable[Mapping[str, Any]],
    entailment: str | PathLike[str] | Judge | None,
    *,
    task: Literal["long_form", "qampari"] = "long_form",
    cache: str | PathLike[str] | None = None,
    max_citations: int | None = ALCE_MAX_CITATIONS,
    normalise: bool = False,
    empty_answers: Literal["skip", "zero"] = "skip",
    splitter: Splitter | None = None,
    rouge: bool | None = None,
    mauve: bool | str = False,
    progress: bool = True,
) -> CitationEvaluation:
    r"""Score cited answers as ALCE does: citation recall and precision, correctness, fluency.

    Of each output the first line counts. Per sentence s with citations c_1..c_n (at most `max_citations`), with
    `judge(premise, s)` on the cited passages joined and the sentence without its marks:

        recall(s)    = judge(c_1..c_n, s), and 0 without a citation or with one out of range
        precision(c) = recall(s) and (n = 1 or judge(c, s) or not judge(the others, s))

    An answer's recall is the mean over its sentences, its precision the sum of precision(c) over its number of
    citations (0 without any; those of a sentence with one out of range are not counted). A score is 100 times the mean
    over the answers.

    Departures from ALCE's script, which change no other number: `[0]` is out of range (there it is the last passage);
    ROUGE is the mean over the answers (there the median of a bootstrap of it); citation marks in a reference answer are
    taken off; `valid_citations`, the share of answers that cite and have nothing out of range, and `cited_sentences`,
    the mean share of sentences that cite, are ours.

    Args:
        rows: mappings, each with
            `question`: a text.
            `output`: the model's answer, a text.
            `passages` (or `docs`): what [1], [2], ... stand for: texts, or mappings with `text` and perhaps `title`.
            Their places are their numbers, unless they have an `index`, which is then the number that cites them.
            Optional, in all rows or in none: `qa_pairs` (ALCE's: a list of {"short_answers": [...]}) or `answers` (a
            list of lists of short answers, or the short answers to the one question), for str_em, or for QAMPARI's
            scores; `claims`, for claim recall; `answer` (or ALCE's `annotations`, each with a `long_answer`), for ROUGE
            and MAUVE.
        entailment: the judge: the name or folder of a model (see `EntailmentModel`), or a callable (premises,
            hypotheses) -> truth values or numbers in [0, 1], of which 0.5 and above is support. The published scores
            are by "google/t5_xxl_true_nli_mixture", loaded in bfloat16 here as there. None leaves out what needs one.
        task: "qampari" takes an answer for a list between commas; each item, behind the question, is a sentence.
        cache: a file to keep the judge's answers in, for the next evaluation.
        max_citations: how many citations of a sentence count; None is all.
        normalise: whether to first rewrite marks of other styles, [1, 2], (1) and so on, and those behind a full stop.
            ALCE reads [1] alone.
        empty_answers: what citation scores an answer without a sentence gets: none ("skip", as in ALCE: it is not in
            the mean) or "zero". For "qampari" an empty answer is one item without a citation.
        splitter: text -> sentences. None is NLTK's Punkt, and a rule of ours where it is not installed.
        rouge: whether to compute ROUGE-Lsum. None is if there are references and rouge-score is installed.
        mauve: whether to compute MAUVE with gpt2-large, or the name of another GPT-2 to do it with.
        progress: whether to show a bar while a model judges.

    Raises:
        ValueError: no rows, a row that lacks a field or has one of the wrong form, or a field that only some rows have.
        ImportError: what `rouge` or `mauve` needs is not installed.

    Source: Gao et al., "Enabling Large Language Models to Generate Text with Citations" (2023, arXiv:2305.14627),
    section 4; for the details the evaluation script of princeton-nlp/ALCE was read.
    """
    _check(task=task, max_citations=max_citations, empty_answers=empty_answers)
    read = read_rows(rows, task)
    split_name, split = metrics.sentence_splitter() if splitter is None else ("given", splitter)
    if normalise:
        for row in read:
            row.output = metrics.evaluated_part(normalise_citations(row.output))
    answers = [_answer(row, task, split, max_citations) for row in read]
    changed = [] if split_name == "punkt" or task == "qampari" else [f"sentences={split_name}"]
    changed += [] if max_citations == ALCE_MAX_CITATIONS else [f"max_citations={max_citations}"]
    changed += ["marks=normalised"] if normalise else []
    empty = sum(not answer.sentences for answer in answers)
    changed += ["empty=zero"] if empty and empty_answers == "zero" else []

    scores: dict[str, float] = {"length": _mean([answer.scores["length"] for answer in answers])}
    notes = _notes_on_outputs(read, answers, task, empty, empty_answers, normalise)
    if entailment is not None:
        judge = _judge(entailment, cache)
        cut = getattr(judge.judge, "truncated", 0)
        _judge_citations(answers, judge, progress)
        _score_citations(answers, empty_answers)
        _judge_claims(read, answers, judge, progress)
        by = _departures_of(judge.judge, cut, notes)
        judged = {name: _percent(answers, name) for name in ("citation_recall", "citation_precision")}
        scores |= _named(judged, [*by, *changed])
        if read[0].claims is not None:
            scores |= _named({"claim_recall": _percent(answers, "claim_recall")}, by)
    for name in ("valid_citations", "cited_sentences"):
        scores[name] = _percent(answers, name)
    _score_correctness(read, answers, task)
    names = [name for name in answers[0].scores if name.startswith(("str_", "qampari_"))]
    scores |= {name: _percent(answers, name) for name in names}
    wanted = rouge if rouge is not None else read[0].reference is not None and task == "long_form" and _has_rouge(notes)
    own_sentences = [f"sentences={split_name}"] if split_name != "punkt" else []
    if wanted:
        for row, answer in zip(_with_reference(read, "rouge"), answers, strict=True):
            answer.scores["rougeLsum"] = metrics.rouge_lsum(_bare(row), row.reference or [], split)
        scores |= _named({"rougeLsum": _percent(answers, "rougeLsum")}, own_sentences)
    if mauve:
        scores |= _mauve(_with_reference(read, "mauve"), mauve)
    return CitationEvaluation(answers, scores, notes, _counts(answers, empty))


def _check(task: str, max_citations: int | None, empty_answers: str) -> None:
    if task not in ("long_form", "qampari"):
        raise ValueError(f"task={task!r}; it must be 'long_form' or 'qampari'")
    if max_citations is not None and max_citations < 1:
        raise ValueError(f"max_citations={max_citations}; it must be 1 or more, or None for all")
    if empty_answers not in ("skip", "zero"):
        raise ValueError(f"empty_answers={empty_answers!r}; it must be 'skip' or 'zero'")


def _with_reference(rows: list[Row], wanted: str) -> list[Row]:
    if rows[0].reference is None:
        raise ValueError(f"{wanted} is asked for, but the rows have no long answer to compare with: give `answer`")
    return rows


def _bare(row: Row) -> str:
    return metrics.without_citations(row.output)


def _answer(row: Row, task: str, split: Splitter, max_citations: int | None) -> Answer:
    if task == "qampari":
        texts = [f"{row.question} {item.strip()}" for item in metrics.listed(row.output)]
    else:
        texts = split(row.output)
    known = {passage.index for passage in row.passages}
    sentences = []
    for text in texts:
        sentence = Sentence(text, metrics.without_citations(text).strip(), metrics.cited(text))
        sentence.out_of_range = not known.issuperset(sentence.citations)
        sentence.counted = [] if sentence.out_of_range else sentence.citations[:max_citations]
        sentence.needed = [False] * len(sentence.counted)
        sentences.append(sentence)
    scores = {
        "length": float(len(_bare(row).split())),
        "valid_citations": float(
            any(sentence.citations for sentence in sentences) and not any(s.out_of_range for s in sentences)
        ),
        "cited_sentences": _mean([float(bool(sentence.citations)) for sentence in sentences]),
    }
    return Answer(row.question, row.output, row.passages, sentences, scores)


def _judge(entailment: Any, cache: str | PathLike[str] | None) -> EntailmentCache:
    if isinstance(entailment, EntailmentCache):
        if cache is not None:
            raise ValueError("cache is given, but entailment is an EntailmentCache, which has its own: leave one out")
        return entailment
    if isinstance(entailment, (str, PathLike)):
        entailment = EntailmentModel(entailment, dtype=torch.bfloat16 if str(entailment) == TRUE_MODEL else None)
    if not callable(entailment):
        raise ValueError(
            f"entailment is a {type(entailment).__name__}; it must be the name or folder of a model, or a callable "
            "(premises, hypotheses) -> truth values. Wrap a loaded model: EntailmentModel(model, tokenizer)"
        )
    return EntailmentCache(entailment, cache)


def _judge_citations(answers: list[Answer], judge: EntailmentCache, progress: bool) -> None:
    """Fill in what the judge says: all citations of a sentence together, then each alone, then all but each."""

    def ask(asked: list[tuple[Answer, Sentence, list[int]]]) -> list[float]:
        premises = ["\n".join(answer.passage(i) for i in ids) for answer, _, ids in asked]
        return judge(premises, [sentence.statement for _, sentence, _ in asked], progress=progress)

    together = [(a, s, s.counted) for a in answers for s in a.sentences if s.counted]
    for (_, sentence, _), support in zip(together, ask(together), strict=True):
        sentence.support, sentence.supported = support, support >= 0.5
        sentence.needed = [sentence.supported] * len(sentence.counted)
    several = [(a, s, k) for a, s, _ in together if s.supported and len(s.counted) > 1 for k in range(len(s.counted))]
    alone = ask([(a, s, [s.counted[k]]) for a, s, k in several])
    unsure = [item for item, support in zip(several, alone, strict=True) if support < 0.5]
    # Of a passage that is cited twice the first mention goes, and the second stays.
    without = ask([(a, s, _less(s.counted, s.counted[k])) for a, s, k in unsure])
    for (_, sentence, k), support in zip(unsure, without, strict=True):
        sentence.needed[k] = support < 0.5


def _less(ids: list[int], one: int) -> list[int]:
    first = ids.index(one)
    return ids[:first] + ids[first + 1 :]


def _score_citations(answers: list[Answer], empty_answers: str) -> None:
    for answer in answers:
        if not answer.sentences and empty_answers == "skip":
            continue
        citations = sum(len(sentence.counted) for sentence in answer.sentences)
        needed = sum(sum(sentence.needed) for sentence in answer.sentences)
        answer.scores["citation_recall"] = _mean([float(sentence.supported) for sentence in answer.sentences])
        answer.scores["citation_precision"] = needed / citations if citations else 0.0


def _judge_claims(rows: list[Row], answers: list[Answer], judge: EntailmentCache, progress: bool) -> None:
    if rows[0].claims is None:
        return
    pairs = [(_bare(row), claim) for row in rows for claim in row.claims or []]
    said = iter(judge([premise for premise, _ in pairs], [claim for _, claim in pairs], progress=progress))
    for row, answer in zip(rows, answers, strict=True):
        answer.scores["claim_recall"] = _mean([float(next(said) >= 0.5) for _ in row.claims or []])


def _score_correctness(rows: list[Row], answers: list[Answer], task: str) -> None:
    for row, answer in zip(rows, answers, strict=True):
        if row.short is None:
            continue
        if task == "qampari":
            answer.scores |= metrics.list_scores(_bare(row), row.short)
        else:
            answer.scores["str_em"] = metrics.exact_match(_bare(row), row.short)
            answer.scores["str_hit"] = float(answer.scores["str_em"] == 1)


def _has_rouge(notes: list[str]) -> bool:
    try:
        metrics.rouge_lsum("a", ["a"], lambda text: [text])
    except ImportError:
        notes.append(f"ROUGE-Lsum was left out: it needs rouge-score. {how_to_install('citation', 'rouge-score')}")
        return False
    return True


def _mauve(rows: list[Row], model: bool | str) -> dict[str, float]:
    name = "gpt2-large" if model is True else str(model)
    references = [metrics.mauve_text(row.question, row.human or "") for row in rows]
    outputs = [metrics.mauve_text(row.question, _bare(row)) for row in rows]
    value = 100 * metrics.mauve(references, outputs, name, 0 if torch.cuda.is_available() else -1)
    return _named({"mauve": value}, [] if name == "gpt2-large" else [f"features={Path(name).name}"])


def _departures_of(judge: Judge, cut_before: int, notes: list[str]) -> list[str]:
    """What the names of its scores have to say of a judge: nothing, if it is TRUE as ALCE runs it."""
    name = judge.name if isinstance(judge, EntailmentModel) else getattr(judge, "__name__", type(judge).__name__)
    if isinstance(judge, EntailmentModel):
        if judge.truncated > cut_before:
            notes.append(
                f"The judge cut {judge.truncated - cut_before} premises to fit into {judge.max_length} tokens."
            )
        if judge.comparable:
            return []
    notes.append(
        f"The judge is {name}, not TRUE as ALCE runs it: no citation or claim score is comparable with published ones."
    )
    return [f"judge={name}"]


def _notes_on_outputs(
    rows: list[Row], answers: list[Answer], task: str, empty: int, empty_answers: str, normalise: bool
) -> list[str]:
    notes = []
    longer = sum(row.goes_on for row in rows)
    if longer:
        notes.append(
            f"{longer} of {len(rows)} outputs go on after their first line. As in ALCE the first line alone is scored; "
            "join the lines with spaces before to have all of it scored."
        )
    if empty:
        fate = "are not in the means of the citation scores" if empty_answers == "skip" else "have citation scores of 0"
        notes.append(f"{empty} of {len(rows)} answers are empty; they {fate}.")
    out = sum(any(sentence.out_of_range for sentence in answer.sentences) for answer in answers)
    if out:
        notes.append(
            f"{out} of {len(rows)} answers cite out of range: the sentence counts as unsupported, and its citations "
            "are not counted in precision."
        )
    blank = sum(any(not metrics.normalised(a) for either in row.short or [] for a in either) for row in rows)
    if blank and task == "long_form":
        notes.append(
            f"{blank} of {len(rows)} rows have a short answer that is all punctuation and articles: it is found in "
            "every output, as in ALCE."
        )
    if not normalise:
        other = sum(len(set(metrics.cited(row.output))) < len(_any_style(row.output)) for row in rows)
        if other:
            notes.append(
                f"{other} of {len(rows)} answers cite in a style that ALCE does not read, [1, 2] or (1) for example; "
                "normalise=True reads them."
            )
    return notes


def _any_style(output: str) -> set[int]:
    return {i for citation in find_citations(output) for i in citation.ids}


def _counts(answers: list[Answer], empty: int) -> dict[str, int]:
    sentences = [sentence for answer in answers for sentence in answer.sentences]
    return {
        "answers": len(answers),
        "empty_answers": empty,
        "sentences": len(sentences),
        "sentences_cited": sum(bool(sentence.citations) for sentence in sentences),
        "sentences_out_of_range": sum(sentence.out_of_range for sentence in sentences),
        "sentences_supported": sum(sentence.supported for sentence in sentences),
        "citations": sum(len(sentence.citations) for sentence in sentences),
        "citations_counted": sum(len(sentence.counted) for sentence in sentences),
        "citations_needed": sum(sum(sentence.needed) for sentence in sentences),
    }


def _named(scores: dict[str, float], departures: list[str]) -> dict[str, float]:
    suffix = f"[{', '.join(departures)}]" if departures else ""
    return {name + suffix: value for name, value in scores.items()}


def _percent(answers: list[Answer], name: str) -> float:
    return 100 * _mean([answer.scores[name] for answer in answers if name in answer.scores])


def _mean(values: list[float]) -> float:
    """0 of nothing."""
    return sum(values) / len(values) if values else 0.0
