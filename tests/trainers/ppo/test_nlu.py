"""The prompts, answers and rewards of the GLUE and SuperGLUE tasks, worked out by hand."""

import math
import time
from typing import Any

import pytest

from peft_dynamic.trainers import nlu_parse, nlu_prompt, nlu_reward, nlu_target, record_rows
from peft_dynamic.trainers.rewards.nlu_tasks import TASKS

# A row of each task with the Hub's columns and label numbers, the text that the prompt has to show, and the answer.
ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "cola": ({"sentence": "He go.", "label": 0, "idx": 3}, ('Sentence: "He go."',), "No"),
    "sst2": ({"sentence": "dull", "label": 1}, ('Sentence: "dull"',), "Positive"),
    "mrpc": (
        {"sentence1": "A b.", "sentence2": "C d.", "label": 1},
        ('Sentence 1: "A b."\nSentence 2: "C d."',),
        "Yes",
    ),
    "qqp": ({"question1": "A?", "question2": "B?", "label": 0}, ('Question 1: "A?"\nQuestion 2: "B?"',), "No"),
    "stsb": ({"sentence1": "A", "sentence2": "B", "label": 3.84}, ('Sentence 1: "A"\nSentence 2: "B"',), "3.8"),
    "mnli": ({"premise": "A", "hypothesis": "B", "label": 1}, ('Premise: "A"\nHypothesis: "B"',), "Neutral"),
    "qnli": ({"question": "Q?", "sentence": "S.", "label": 0}, ('Question: "Q?"\nSentence: "S."',), "Yes"),
    "rte": ({"sentence1": "A", "sentence2": "B", "label": 0}, ('Text: "A"\nHypothesis: "B"',), "Yes"),
    "wnli": ({"sentence1": "A", "sentence2": "B", "label": 0}, ('Text: "A"\nHypothesis: "B"',), "No"),
    "ax": ({"premise": "A", "hypothesis": "B", "label": 2}, ('Premise: "A"\nHypothesis: "B"',), "Contradiction"),
    "boolq": ({"passage": "P", "question": "q", "label": 1}, ('Passage: "P"\nQuestion: "q"',), "Yes"),
    "cb": ({"premise": "A", "hypothesis": "B", "label": 1}, ('Premise: "A"\nHypothesis: "B"',), "Contradiction"),
    "copa": (
        {"premise": "P", "choice1": "X", "choice2": "Y", "question": "cause", "label": 1},
        ('Premise: "P"\nAsked for: "cause"\nOption one: "X"\nOption two: "Y"',),
        "Option two",
    ),
    "wic": (
        {"word": "w", "sentence1": "A", "sentence2": "B", "label": 1, "start1": 0},
        ('Word: "w"\nSentence 1: "A"\nSentence 2: "B"',),
        "Same",
    ),
    "wsc": (
        {"text": "T", "span1_text": "Mark", "span2_text": "he", "label": 1},
        ('Text: "T"\nPronoun: "he"\nNoun: "Mark"',),
        "Yes",
    ),
    "multirc": (
        {"paragraph": "P", "question": "Q?", "answer": "a", "label": 0},
        ('Paragraph: "P"\nQuestion: "Q?"\nAnswer: "a"',),
        "False",
    ),
    "record": ({"passage": "P", "statement": "S", "label": 1}, ('Passage: "P"\nStatement: "S"',), "Yes"),
}


def test_every_task_has_a_row_here() -> None:
    assert list(ROWS) == list(TASKS)


@pytest.mark.parametrize("task", ROWS)
def test_prompt_answer_and_reward_of_a_task_belong_together(task: str) -> None:
    row, shown, word = ROWS[task]
    prompt = nlu_prompt(task, row)
    assert isinstance(prompt, str)
    assert prompt.startswith("System_prompt:\nYou are a")
    assert f"\n\nPrompt:\n{shown[0]}\n\nAssistant:\n<Judgement>" in prompt
    assert prompt.endswith("<Judgement>")
    assert prompt.count("answer </Judgement>") == 1
    for each in TASKS[task].words:
        assert each in prompt.partition("\n\nPrompt:")[0]  # the model is told what it may answer
    target = nlu_target(task, row)
    assert target == f" {word} </Judgement>"
    expected = 2.46 if task == "stsb" else 1.0  # 2.5 - |3.8 - 3.84|
    assert nlu_reward(task)(completions=[target], label=[row["label"]]) == [pytest.approx(expected)]


@pytest.mark.parametrize("task", [task for task in TASKS if TASKS[task].words])
def test_only_the_word_of_the_label_is_rewarded(task: str) -> None:
    words = TASKS[task].words
    for label in range(len(words)):
        row = ROWS[task][0] | {"label": label}
        rewards = nlu_reward(task)([f" {word} </Judgement>" for word in words], [label] * len(words))
        assert rewards == [1.0 if other == label else -1.0 for other in range(len(words))]
        assert nlu_parse(task, nlu_target(task, row)) == label


def test_a_row_without_its_label_has_a_prompt_too() -> None:
    assert nlu_prompt("SST-2", {"sentence": "dull"}) == nlu_prompt("sst2", ROWS["sst2"][0])


def test_the_columns_of_superglues_rte_are_taken_as_well() -> None:
    assert nlu_prompt("rte", {"premise": "A", "hypothesis": "B"}) == nlu_prompt("rte", ROWS["rte"][0])


@pytest.mark.parametrize(
    ("completion", "label"),
    [
        (" Yes </Judgement>", 1),
        ("yes</judgement>", 1),
        ("\n\tNO.\n< / Judgement >", 0),
        ("<Judgement> Yes </Judgement>", 1),  # the tag once more
        (" Yes </Judgement> No </Judgement>", 1),  # what comes after the first closing tag is not read
        ("The answer is 'Yes', I think.</Judgement>", 1),
        ("I said No. <Judgement>Yes</Judgement>", 1),
        (" Yes", None),  # not closed
        ("", None),
        (" </Judgement>", None),
        (" Now </Judgement>", None),  # the authors' code reads these seven as No
        (" Not sure </Judgement>", None),
        (" Nothing </Judgement>", None),
        (" None </Judgement>", None),
        (" Norway </Judgement>", None),
        (" No-one </Judgement>", None),
        (" Know_No </Judgement>", None),
        (" Yesterday </Judgement>", None),
        (" Yes and No </Judgement>", None),
        (" Yes/No </Judgement>", None),
        (" not Yes </Judgement>", None),
        (" It isn't yes </Judgement>", None),
        ("</Judgement> Yes </Judgement>", None),
    ],
)
def test_reading_a_word(completion: str, label: int | None) -> None:
    assert nlu_parse("cola", completion) == label
    assert nlu_parse("boolq", completion) == label  # another task of the same words
    expected = {1: 1.0, 0: -1.0, None: -3.0}[label]
    assert nlu_reward("cola")([completion], [1]) == [expected]


@pytest.mark.parametrize(
    ("task", "said", "label"),
    [
        ("wic", "Not the same", None),
        ("wic", "The meanings are not different", None),
        ("wic", "They're not different but the same", 1),
        ("sst2", "Not very positive", None),
        ("sst2", "It isn\u2019t positive", None),
        ("sst2", "not negative, positive", 1),
        ("sst2", "Hardly positive", None),
        ("sst2", "Anything but negative", None),
        ("sst2", "I would not call it negative, so: positive", 1),
        ("sst2", "non-positive", None),
        ("cola", "It isn\u2019t Yes", None),
        ("cola", "It isn\u02bct yes", None),
        ("cola", "isn't a yes", None),
        ("boolq", "never yes", None),
        ("mnli", "Neither entailment nor contradiction, neutral", 1),
        ("mnli", "not entailment", None),
        ("cb", "cannot be entailment", None),
        ("multirc", "That is not true", None),
        ("multirc", "Not quite true.", None),
        ("multirc", "True. It could not be false.", 1),
        ("copa", "Not option one", None),
        ("copa", "Option two, not option one", 1),
        ("rte", "I am not sure. Yes", 0),
        ("record", "No, that isn't it", 0),
    ],
)
def test_a_word_behind_a_negation_is_no_answer(task: str, said: str, label: int | None) -> None:
    assert nlu_parse(task, f" {said} </Judgement>") == label


def test_both_words_of_sst2_are_no_answer() -> None:
    assert nlu_reward("sst2")([" Positive and Negative </Judgement>", " Positive </Judgement>"], [1, 1]) == [-3.0, 1.0]


def test_three_classes() -> None:
    said = [
        " Entailment </Judgement>",
        " neutral </Judgement>",
        " Entailment or Neutral </Judgement>",
        " not_entailment ",
    ]
    assert nlu_reward("mnli")([*said, " Contradictions </Judgement>"], [0] * 5) == [1.0, -1.0, -3.0, -3.0, -3.0]
    # CommitmentBank numbers its classes otherwise than MNLI
    assert [nlu_parse(task, " Neutral </Judgement>") for task in ("mnli", "ax", "cb")] == [1, 1, 2]


def test_copas_options_are_told_apart_whatever_stands_between_their_words() -> None:
    assert nlu_reward("copa")([" Option\n  two</Judgement>", " Option one two </Judgement>"], [1, 1]) == [1.0, -1.0]


def test_record_is_milder_with_an_unclear_word_but_not_with_a_missing_tag() -> None:
    said = [" Yes </Judgement>", " No </Judgement>", " maybe </Judgement>", " Yes No </Judgement>", " Yes"]
    assert nlu_reward("record")(said, [1] * 5) == [1.0, -1.0, -1.0, -1.0, -3.0]


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("3.5", 3.5),
        ("4", 4.0),
        ("3.", 3.0),
        (".5", 0.5),
        ("+2.25", 2.25),
        ("0.35e1", 3.5),
        ("The score is 2.4 out of 5.0.", 2.4),
        ("4/5", 4.0),
        ("2-3", 2.0),
        ("900", 5.0),
        ("-3", 0.0),
        ("\u22122", 0.0),  # a minus sign that is no hyphen
        ("\u20132", 0.0),
        ("2\u20133", 2.0),
        ("80%", None),  # other scales than 0 to 5
        ("80 %", None),
        ("80 percent", None),
        ("8/10", None),
        ("8 out of 10", None),
        ("0.8 / 1", None),
        ("4 / 5.0", 4.0),
        ("4 out of 5", 4.0),
        ("-0.0", 0.0),
        ("1e999", None),
        ("9" * 400, None),
        ("nan", None),
        ("inf", None),
        ("-Infinity", None),
        ("three", None),
        ("v2", None),
        ("", None),
    ],
)
def test_reading_a_number(said: str, value: float | None) -> None:
    assert nlu_parse("stsb", f" {said} </Judgement>") == value
    reward = nlu_reward("stsb")([f" {said} </Judgement>"], [1.0])[0]
    assert reward == (-2.5 if value is None else 2.5 - abs(value - 1.0))
    assert math.isfinite(reward)


def test_the_reward_of_stsb_lies_between_its_bounds() -> None:
    said = [" 5 </Judgement>", " 0 </Judgement>", " 77 </Judgement>", " 5.0"]
    assert nlu_reward("stsb")(said, [5, 5.0, 0.0, 5.0]) == [2.5, -2.5, -2.5, -2.5]


def test_reading_a_very_long_answer_takes_no_time() -> None:
    start = time.process_time()
    for said in ("9" * 50_000 + "a", "not " * 20_000, "<judgement" * 5_000, "< " * 20_000, "No" * 20_000):
        for task in ("stsb", "cola"):
            nlu_parse(task, said + "</Judgement>")
            nlu_parse(task, said + "</Analysis>" + said, chain_of_thought=True)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("completion", "label"),
    [
        (" it is so. </Analysis>\n<Judgement> Yes </Judgement>", 1),
        (" it is so. </Analysis>\n Yes </Judgement>", None),  # no opening tag
        (" it is so. <Judgement> Yes </Judgement>", None),  # no end of the analysis
        (" <Judgement> Yes </Judgement> </Analysis>", None),  # in the analysis
        (" No, or <Judgement> No </Judgement>? </Analysis> <Judgement> Yes </Judgement>", 1),
        (" it is so. </Analysis> <Judgement> Yes", None),
        (" </Analysis> No <Judgement> Yes </Judgement>", 1),
    ],
)
def test_chain_of_thought(completion: str, label: int | None) -> None:
    assert nlu_parse("cola", completion, chain_of_thought=True) == label
    assert nlu_reward("cola", chain_of_thought=True)([completion], [1]) == [-3.0 if label is None else 1.0]


def test_the_forms_of_prompt_and_answer() -> None:
    row = {"sentence": "He go.", "label": 0, "analysis": "It must be goes."}
    system = "You are a linguist. Decide whether the sentence is acceptable English. "
    form = "Answer as <Judgement> answer </Judgement>, where the answer is No or Yes."
    reason = "First write a short reason as <Analysis> reason </Analysis>. "
    asked = 'Sentence: "He go."'
    assert nlu_prompt("cola", row) == (f"System_prompt:\n{system}{form}\n\nPrompt:\n{asked}\n\nAssistant:\n<Judgement>")
    assert nlu_prompt("cola", row, chain_of_thought=True) == (
        f"System_prompt:\n{system}{reason}{form}\n\nPrompt:\n{asked}\n\nAssistant:\n<Analysis>"
    )
    assert nlu_prompt("cola", row, chat=True) == [
        {"role": "system", "content": system + form},
        {"role": "user", "content": asked},
    ]
    shot = {"sentence": "She goes.", "label": 1}
    assert nlu_prompt("cola", row, shots=[shot]) == (
        f'System_prompt:\n{system}{form}\n\nPrompt:\nSentence: "She goes."\n\nAssistant:\n'
        f"<Judgement> Yes </Judgement>\n\nPrompt:\n{asked}\n\nAssistant:\n<Judgement>"
    )
    assert nlu_prompt("cola", row, chat=True, shots=[shot])[1:] == [
        {"role": "user", "content": 'Sentence: "She goes."'},
        {"role": "assistant", "content": "<Judgement> Yes </Judgement>"},
        {"role": "user", "content": asked},
    ]
    thought = " It must be goes. </Analysis>\n<Judgement> No </Judgement>"
    assert nlu_target("cola", row, chain_of_thought=True) == thought
    message = nlu_target("cola", row, chain_of_thought=True, chat=True)
    assert message == [{"role": "assistant", "content": "<Analysis>" + thought}]
    assert nlu_reward("cola", chain_of_thought=True)([thought, message], [0, 0]) == [1.0, 1.0]


def test_completions_as_messages() -> None:
    reward = nlu_reward("sst2")
    parts = [{"type": "text", "text": "<Judgement> Posi"}, {"type": "text", "text": "tive </Judgement>"}]
    said = [
        [{"role": "assistant", "content": "<Judgement> Positive </Judgement>"}],
        [{"role": "assistant", "content": parts}],
        [{"role": "assistant", "content": None}],
        [],
    ]
    assert reward(completions=said, label=[1] * 4, prompts=[""] * 4, trainer_state=None) == [1.0, 1.0, -3.0, -3.0]
    assert reward.__name__ == "nlu_reward_sst2"


RECORD = {
    "passage": "Ann met Bob.\n@highlight\nBob met the Cat",
    "query": "@placeholder saw Bob",
    "entities": ["Ann", "Bob", "Cat", "Ann"],
    "answers": ["Ann", "Ann"],
    "idx": 1,
}


def test_a_query_of_record_becomes_one_row_per_entity() -> None:
    rows = record_rows(RECORD)
    assert [(row["entity"], row["label"], row["statement"]) for row in rows] == [
        ("Ann", 1, "Ann saw Bob"),
        ("Bob", 0, "Bob saw Bob"),
        ("Cat", 0, "Cat saw Bob"),
    ]
    assert {row["passage"] for row in rows} == {"Ann met Bob. Bob met the Cat"}
    assert rows[0]["idx"] == 1


def test_a_query_of_record_becomes_a_right_and_a_wrong_row_to_train_on() -> None:
    drawn = [[(row["entity"], row["label"]) for row in record_rows(RECORD, seed=seed)] for seed in range(20)]
    assert {tuple(pair) for pair in drawn} == {(("Ann", 1), ("Bob", 0)), (("Ann", 1), ("Cat", 0))}
    assert record_rows(RECORD, seed=3) == record_rows(RECORD, seed=3)
    assert [row["label"] for row in record_rows(RECORD | {"entities": ["Ann"]}, seed=0)] == [1]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task='glue' is not known; there are cola, sst2, .*record"):
        nlu_prompt("glue", {})
    with pytest.raises(ValueError, match="task='xnli' is not known"):
        nlu_reward("xnli")
    with pytest.raises(ValueError, match=r"'rte' needs a column 'sentence1' or 'premise', and the row has \['text'\]"):
        nlu_prompt("rte", {"text": "A"})
    with pytest.raises(ValueError, match=r"'statement'.*record_rows"):
        nlu_prompt("record", RECORD)
    with pytest.raises(ValueError, match=r"label=-1: .*0 \(No\), 1 \(Yes\). -1 marks a row without a label"):
        nlu_reward("cola")([""], [-1])
    for label in (2, 1.0, True, "Yes", None):
        with pytest.raises(ValueError, match="must be one of the integers"):
            nlu_reward("cola")([""], [label])
    for label in (5.1, -1, math.nan, "3", None):
        with pytest.raises(ValueError, match="must be a number from 0 to 5"):
            nlu_reward("stsb")([""], [label])
    with pytest.raises(ValueError, match=r"needs a column 'label' in the dataset; it has \['sentence'\]"):
        nlu_reward("cola")([""], sentence=["A"])
    with pytest.raises(ValueError, match="needs a column 'label'"):
        nlu_target("cola", {"sentence": "A"})
    with pytest.raises(ValueError, match="needs a column 'analysis'"):
        nlu_prompt("cola", {"sentence": "A"}, chain_of_thought=True, shots=[{"sentence": "A", "label": 1}])
