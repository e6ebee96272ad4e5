"""Language understanding as generation: the prompt of a task, the answer to train on, and the reward of an answer.

The recipe is the paper's: a prompt that ends inside an opened tag, an answer of one or two words, and a reward that a
few lines of code read off it. `nlu_reward(task)` is a reward function as TRL's `GRPOTrainer` and `RLOOTrainer` and our
`PPOTrainer` take it.

What the authors' code does and this does not:

- It looks for the label words as they are written, anywhere in the answer: "no" is no answer, and "Not sure" and "Now"
  are "No". Here capitals do not matter and a word counts only as a whole, not in "Non-" or "not_", nor after a "not".
- For SST-2 an answer with both words counts as "Positive". Here it is unclear, as in the other tasks.
- For STS-B it takes the first number with a decimal point, and an answer of 900 is rewarded with about -900. Here it is
  the first number, cut to 0..5; one too large for a float counts as none, like "nan" or "inf".
- Its supervised baseline trains on other words than it is asked for (SST-2's negatives are "No", five tasks have 0 and
  1). Here `nlu_target` and `nlu_reward` read the same table.

Source: Hu, Somayajula, Cao, Pan, Xie, "Fine-tuning large language models with PPO for language understanding", 2024,
arXiv 2410.11020. Read: github.com/coder-qicao/RL4GLUE. The wording of the prompts is ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from peft_dynamic.trainers.rewards.nlu_tasks import HIGHEST_SIMILARITY, NLUTask, Row, task_named

Message = dict[str, str]
RewardFunction = Callable[..., list[float]]

_OPEN = re.compile(r"<\s*judgement\s*>", re.I)
_CLOSE = re.compile(r"<\s*/\s*judgement\s*>", re.I)
_END_OF_ANALYSIS = re.compile(r"<\s*/\s*analysis\s*>", re.I)
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?(?!\w)", re.I)

# 80%, 80 percent, 8/10, 8 out of 10: other scales than 0 to 5
_OTHER_SCALE = re.compile(r"\s*(?:%|per\s?cent\b|(?:/|out of)\s*(?!5(?:\.0*)?(?![\d.]*\d))\d)", re.I)
_NEGATION = re.compile(
    r"\b(?:not|never|neither|nor|cannot|hardly|barely|scarcely|without|far from|anything but|rather than|instead of"
    r"|opposite of)\b|n't\b|\bnon[- ]$",
    re.I,
)
_PART = re.compile(
    r"[.,;:!?()\n]|(?<!anything )\bbut\b|\b(?:so|because|since|hence|therefore|thus)\b", re.I
)  # a negation goes so far
_REACH = 60  # characters: a negation is near, and long answers take no time
# Curly apostrophes, and the minus signs that are no hyphens
_PLAIN = str.maketrans(dict.fromkeys("’‘ʼ`´＇", "'") | dict.fromkeys("−﹣－‐‑–—", "-"))


def nlu_prompt(
    task: str, row: Row, chain_of_thought: bool = False, chat: bool = False, shots: Sequence[Row] = ()
) -> str | list[Message]:
    """The prompt for one row: a system block, the inputs in quotes, and the tag that the answer goes on from.

    Args:
        task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, ax, boolq, cb, copa, wic, wsc, multirc or record. For
            record the rows are those of `record_rows`.
        row: the columns of the task, named as on the Hub. No label is needed.
        chain_of_thought: ask for a short analysis first.
        chat: messages for a chat template, in place of one text. The answer then begins with the tag.
        shots: labelled rows that stand before the row as examples; with `chain_of_thought` they need an `analysis` too.

    Returns:
        The text, or the messages.

    Raises:
        ValueError: an unknown task, a missing column, a shot without label.

    Source: arXiv 2410.11020.
    """
    of = task_named(task)
    form = f"{', '.join(of.words[:-1])} or {of.words[-1]}" if of.words else "a number from 0 to 5"
    reason = "First write a short reason as <Analysis> reason </Analysis>. " if chain_of_thought else ""
    system = f"{of.instruction} {reason}Answer as <Judgement> answer </Judgement>, where the answer is {form}."
    asked = [(of.text(shot), _answer(of, shot, chain_of_thought)) for shot in shots]
    if chat:
        examples = [
            message
            for question, answer in asked
            for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        ]
        return [{"role": "system", "content": system}, *examples, {"role": "user", "content": of.text(row)}]
    before = "".join(f"Prompt:\n{question}\n\nAssistant:\n{answer}\n\n" for question, answer in asked)
    tag = "<Analysis>" if chain_of_thought else "<Judgement>"
    return f"System_prompt:\n{system}\n\n{before}Prompt:\n{of.text(row)}\n\nAssistant:\n{tag}"


def nlu_target(task: str, row: Row, chain_of_thought: bool = False, chat: bool = False) -> str | list[Message]:
    """The answer that `nlu_reward` rewards most, to train on before PPO: the `completion` to `nlu_prompt`'s `prompt`.

    Args:
        task: as for `nlu_prompt`.
        row: with its `label`; with `chain_of_thought` also with an `analysis`.
        chain_of_thought: as in the prompt.
        chat: as in the prompt.

    Returns:
        The text that continues the prompt, e.g. " Yes </Judgement>", or the assistant's message.

    Raises:
        ValueError: an unknown task, a label that is missing or not the task's, no analysis.
    """
    answer = _answer(task_named(task), row, chain_of_thought)
    if chat:
        return [{"role": "assistant", "content": answer}]
    return answer.partition(">")[2]  # the prompt has the first tag


def _answer(task: NLUTask, row: Row, chain_of_thought: bool) -> str:
    if "label" not in row:
        raise ValueError(f"row: the answer needs a column 'label', and the row has {sorted(row)}.")
    judgement = f"<Judgement> {task.answer(row['label'])} </Judgement>"
    if not chain_of_thought:
        return judgement
    if not row.get("analysis"):
        raise ValueError(
            f"row: with chain_of_thought=True an example answer needs a column 'analysis' with the text of the "
            f"reasoning, and the row has {sorted(row)}. PPO itself needs none: it makes its own."
        )
    return f"<Analysis> {row['analysis']} </Analysis>\n{judgement}"


def nlu_parse(task: str, completion: str | Sequence[Message], chain_of_thought: bool = False) -> int | float | None:
    """What a completion answers.

    The judgement is what stands before the first closing tag, and after the opening one if there is one. It has to hold
    exactly one of the label words. A negation before the word, in its part of the sentence, makes it no answer: "Not
    very positive". For STS-B the first number counts, cut to 0..5, unless it is on another scale (80%, 8/10).

    Args:
        task: as for `nlu_prompt`.
        completion: the text that follows the prompt, or the messages, of which the last one counts.
        chain_of_thought: then the end of an analysis has to come first, and the opening tag has to be there.

    Returns:
        The label, a float for STS-B; None if there is no answer.

    Raises:
        ValueError: an unknown task.
    """
    judgement = _judgement(completion, chain_of_thought)
    return None if judgement is None else _read(task_named(task), judgement)


def _judgement(completion: str | Sequence[Message], chain_of_thought: bool) -> str | None:
    """The text between the tags, white space made plain; None if the form is not kept."""
    text = completion if isinstance(completion, str) else _content(completion)
    if chain_of_thought:
        reasoned = _END_OF_ANALYSIS.search(text)
        opened = _OPEN.search(text, reasoned.end()) if reasoned else None
        if opened is None:
            return None
        text = text[opened.start() :]
    closed = _CLOSE.search(text)
    if closed is None:
        return None
    return " ".join(_OPEN.split(text[: closed.start()])[-1].split())


def _content(messages: Sequence[Message]) -> str:
    content: Any = messages[-1].get("content") if messages else ""
    if isinstance(content, list):  # the parts of a multimodal message
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _read(task: NLUTask, judgement: str) -> int | float | None:
    judgement = judgement.translate(_PLAIN)
    if task.words:
        found = [label for label, word in enumerate(task.words) if _says(word, judgement)]
        return found[0] if len(found) == 1 else None
    number = _NUMBER.search(judgement)
    if number is None or _OTHER_SCALE.match(judgement, number.end()):
        return None
    value = float(number[0])
    return min(max(value, 0.0), HIGHEST_SIMILARITY) if math.isfinite(value) else None


def _says(word: str, judgement: str) -> bool:
    """Whether the word stands there, and no negation before it in its part of the sentence."""
    return any(
        not _NEGATION.search(_PART.split(judgement[: match.start()])[-1][-_REACH:])
        for match in _pattern(word).finditer(judgement)
    )


def _pattern(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){word}(?![\w-])", re.I)  # `re` keeps what it compiled


def nlu_reward(task: str, chain_of_thought: bool = False) -> RewardFunction:
    """A reward function for a task, for the `reward_funcs` of GRPOTrainer, RLOOTrainer and PPOTrainer.

    +1 for the right label and -1 for a wrong one; -3 where the closing tag is missing, or the judgement has none or
    several of the label words (ReCoRD: -1 for the latter). STS-B: 2.5 - |answer - label|, with the answer cut to 0..5,
    and -2.5 without a number.

    Args:
        task: as for `nlu_prompt`.
        chain_of_thought: as for `nlu_prompt`.

    Returns:
        A function of `completions`, texts or messages, and of the column `label`; it leaves other columns alone. It
        returns one number a completion, and raises ValueError for a label that is not the task's, or no labels.

    Raises:
        ValueError: an unknown task.

    Source: arXiv 2410.11020.
    """
    of = task_named(task)

    def reward(completions: Sequence[Any], label: Sequence[Any] | None = None, **columns: Any) -> list[float]:
        if label is None:
            raise ValueError(
                f"the reward of {of.name!r} needs a column 'label' in the dataset; it has {sorted(columns)}."
            )
        return [
            _score(of, _judgement(completion, chain_of_thought), of.gold(gold))
            for completion, gold in zip(completions, label, strict=True)
        ]

    reward.__name__ = f"nlu_reward_{of.name}"  # the name in the trainers' logs
    return reward


def _score(task: NLUTask, judgement: str | None, gold: int | float) -> float:
    if judgement is None:
        return -3.0 if task.words else task.unclear
    answer = _read(task, judgement)
    if answer is None:
        return task.unclear
    if task.words:
        return 1.0 if answer == gold else -1.0
    return HIGHEST_SIMILARITY / 2 - abs(answer - gold)
