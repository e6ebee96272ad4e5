"""The metrics of GLUE and SuperGLUE on answers counted by hand, and a model's answers."""

import math
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dynamic.trainers import evaluate_nlu, nlu_metrics, nlu_parse, nlu_prompt
from peft_dynamic.trainers.rewards import nlu_eval

LABELS = [1, 1, 1, 0, 0, 1]


def rows(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"label": label} for label in labels]


def test_accuracy_counts_an_unparsable_answer_as_wrong() -> None:
    for task in ("sst2", "qnli", "rte", "wnli", "boolq", "copa", "wic", "wsc", "mnli"):
        found = nlu_metrics(task, [1, 0, None, 0, None, 1], rows(LABELS))
        assert found == {"accuracy": 3 / 6, "score": 3 / 6, "unparsable": 2 / 6}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_f1_of_two_classes(task: str) -> None:
    # None becomes the other class: predicted 1 0 0 0 1 1, so 2 right of 3 that were taken for 1 and of 4 that are
    found = nlu_metrics(task, [1, 0, None, 0, None, 1], rows(LABELS))
    assert found["f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert found["score"] == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert nlu_metrics(task, [0, 0], rows([0, 0]))["f1"] == 0.0


def test_matthews_correlation_of_two_classes() -> None:
    # TP 3, FN 1, TN 1, FP 1: (3 * 1 - 1 * 1) / sqrt(4 * 4 * 2 * 2)
    found = nlu_metrics("cola", [1, 1, 0, 0, 1, 1], rows(LABELS))
    assert found == {"matthews_correlation": pytest.approx(2 / 8), "score": pytest.approx(2 / 8), "unparsable": 0.0}
    assert nlu_metrics("cola", [None] * 6, rows(LABELS))["matthews_correlation"] == -1.0
    assert nlu_metrics("cola", [1] * 6, rows(LABELS))["matthews_correlation"] == 0.0
    assert nlu_metrics("cola", LABELS, rows(LABELS))["matthews_correlation"] == pytest.approx(1.0)


def test_matthews_correlation_of_three_classes() -> None:
    # labels 0 0 1 2, predicted 0 1 1 2: 3 right of 4; the classes are predicted 1 2 1 times and are there 2 1 1 times.
    # (3 * 4 - (2 + 2 + 1)) / sqrt((16 - 6) * (16 - 6))
    assert nlu_metrics("ax", [0, 1, 1, 2], rows([0, 0, 1, 2]))["matthews_correlation"] == pytest.approx(7 / 10)
    # with the second unread, the fourth class is predicted once: (3 * 4 - (2 + 1 + 1)) / sqrt((16 - 4) * (16 - 6))
    found = nlu_metrics("ax", [0, None, 1, 2], rows([0, 0, 1, 2]))
    assert found["matthews_correlation"] == pytest.approx(8 / math.sqrt(120))


def test_f1_of_commitmentbank_is_the_mean_over_its_classes() -> None:
    # labels 0 0 1 2, predicted 0 - 1 1: F1 2/3 of class 0 (1 right, 1 predicted, 2 there), 2/3 of class 1, 0 of class 2
    found = nlu_metrics("cb", [0, None, 1, 1], rows([0, 0, 1, 2]))
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert found["accuracy"] == 0.5
    assert nlu_metrics("cb", [0, 0], rows([0, 0]))["f1_macro"] == 1.0  # over the classes that occur


def test_correlations_of_stsb() -> None:
    labels, said = [0.0, 1.0, 2.0, 5.0], [1.0, 1.0, 3.0, 2.0]
    # deviations -2 -1 0 3 and -.75 -.75 1.25 .25: 1.5 + .75 + .75 = 3, over sqrt(14 * 2.75)
    # ranks 1 2 3 4 and 1.5 1.5 4 3: deviations -1.5 -.5 .5 1.5 and -1 -1 1.5 .5: 3.5 over sqrt(5 * 4.5)
    found = nlu_metrics("stsb", said, rows(labels))
    assert found["pearson"] == pytest.approx(3 / math.sqrt(14 * 2.75))
    assert found["spearmanr"] == pytest.approx(3.5 / math.sqrt(5 * 4.5))
    assert found["score"] == pytest.approx((found["pearson"] + found["spearmanr"]) / 2)
    # an unread answer is 5 where the label is at most 2.5, and else 0
    unread = nlu_metrics("stsb", [None, 1.0, 3.0, None], rows(labels))
    assert unread["pearson"] == pytest.approx(nlu_metrics("stsb", [5.0, 1.0, 3.0, 0.0], rows(labels))["pearson"])
    assert unread["unparsable"] == 0.5
    constant = nlu_metrics("stsb", [0.1] * 4, rows(labels))
    assert (constant["pearson"], constant["spearmanr"]) == (0.0, 0.0)


def test_multirc_counts_answers_and_questions() -> None:
    asked = [("P", "Q1", 1), ("P", "Q1", 0), ("P", "Q2", 1), ("R", "Q1", 1)]
    data = [{"paragraph": p, "question": q, "answer": str(i), "label": g} for i, (p, q, g) in enumerate(asked)]
    found = nlu_metrics("multirc", [1, 0, 0, 1], data)
    assert found["f1_a"] == pytest.approx(2 * 2 / (2 + 3))
    assert found["question_exact_match"] == pytest.approx(2 / 3)


def test_record_takes_the_first_entity_that_is_judged_right() -> None:
    answers = ["The Big Cat", "Tom"]
    entities = [("Ann", 0), ("big cat!", 0), ("Tom", 1)]
    data = [
        {"passage": "P", "query": query, "entity": entity, "answers": answers, "label": label}
        for query in ("A @placeholder", "B @placeholder", "C @placeholder", "D @placeholder")
        for entity, label in entities
    ]
    data[3]["entity"] = "Tom"
    data[10]["entity"] = "cat house"
    # A: "big cat!" is an answer but for case, article and punctuation. B: none is judged right. C: Ann, wrong.
    # D: "cat house" shares one word with "big cat"
    found = nlu_metrics("record", [0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0], data)
    assert found["entity_exact_match"] == pytest.approx(1 / 4)
    assert found["token_f1"] == pytest.approx((1 + 0 + 0 + 2 * 1 / (2 + 2)) / 4)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="there are 0 for 0 predictions"):
        nlu_metrics("cola", [], [])
    with pytest.raises(ValueError, match="there are 2 for 1 predictions"):
        nlu_metrics("cola", [1], rows([1, 1]))
    with pytest.raises(ValueError, match="label=-1"):
        nlu_metrics("cola", [1], rows([-1]))
    with pytest.raises(ValueError, match="label=None"):
        evaluate_nlu(None, None, "cola", [{"sentence": "A"}])


@pytest.mark.parametrize("missing", ["sklearn.metrics", "scipy.stats"])
def test_without_the_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for call in (lambda: nlu_metrics("cola", [1], rows([1])), lambda: evaluate_nlu(None, None, "cola", [])):
        with pytest.raises(ImportError, match=r"pip install scikit-learn scipy \(or, .* pip install '\.\[nlu\]'\)\."):
            call()


# A model's answers


def model_and_tokenizer() -> tuple[LlamaForCausalLM, Any]:
    from tests.trainers.ppo.nlu_words import tokenizer

    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,  # so that answers depend on the prompt
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config), words


def test_batches_of_padded_prompts_get_the_answers_of_single_ones() -> None:
    model, words = model_and_tokenizer()
    words.padding_side = "right"
    prompts = ["Yes", "No Yes No Yes", "a a a a a a a a a <Judgement>", "No", "Yes a"]
    alone = []
    for prompt in prompts:
        ids = words(prompt, return_tensors="pt")
        done = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=words.pad_token_id)
        alone.append(words.decode(done[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    assert len(set(alone)) > 2
    model.train()
    model.model.layers[0].eval()
    for size in (1, 2, 5):
        assert nlu_eval.generate_answers(model, words, prompts, size, 6, special=True) == alone
    assert model.training
    assert not model.model.layers[0].training
    assert words.padding_side == "right"


def test_an_evaluation_asks_reads_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = model_and_tokenizer()
    data = [{"sentence": text, "label": label} for text, label in (("Yes", 1), ("No a", 0), ("a a a", 1), ("a No", 0))]
    shots = [{"sentence": "No", "label": 0}]
    seen: list[str] = []
    answers = {"Yes": " Yes </Judgement>", "No a": " Yes </Judgement>", "a a a": "?", "a No": " No </Judgement>"}

    def generate(model: Any, tokenizer: Any, prompts: list[str], batch_size: int, limit: int, special: bool) -> Any:
        seen.extend(prompts)
        assert (batch_size, limit, special) == (3, 16, True)
        return [next(said for text, said in answers.items() if f'"{text}"\n\nA' in prompt[-70:]) for prompt in prompts]

    monkeypatch.setattr(nlu_eval, "generate_answers", generate)
    found = evaluate_nlu(model, words, "cola", data, batch_size=3, shots=shots)
    assert seen == [nlu_prompt("cola", row, shots=shots) for row in data]
    assert found == nlu_metrics("cola", [1, 1, None, 0], data)
    assert found["unparsable"] == 0.25


def test_an_evaluation_by_the_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = model_and_tokenizer()
    generate, seen = nlu_eval.generate_answers, []

    def witness(model: Any, tokenizer: Any, prompts: list[str], *sizes: int, special: bool) -> list[str]:
        seen.append(special)
        return generate(model, tokenizer, prompts, *sizes, special=special)

    monkeypatch.setattr(nlu_eval, "generate_answers", witness)
    data = [{"sentence": text, "label": 1} for text in ("Yes", "No a", "a a a")]
    found = evaluate_nlu(model, words, "cola", data, chat=True, max_new_tokens=8)
    texts = [
        words.apply_chat_template(nlu_prompt("cola", row, chat=True), tokenize=False, add_generation_prompt=True)
        for row in data
    ]
    assert all(text.startswith("system: You") and text.endswith("assistant:") for text in texts)
    assert seen == [False]  # the template has put the special tokens in
    said = generate(model, words, texts, 2, 8, special=False)
    assert found == nlu_metrics("cola", [nlu_parse("cola", text) for text in said], data)


def test_a_quantised_model_can_be_trained_after_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = model_and_tokenizer()
    kept: list[Any] = []
    monkeypatch.setattr(nlu_eval, "unpack_bnb_4bit", kept.append)  # tested where it belongs; here: that it is called
    evaluate_nlu(model, words, "cola", [{"sentence": "A", "label": 1}], max_new_tokens=1)
    assert kept == [model]


def test_a_tokenizer_without_padding_is_refused() -> None:
    model, words = model_and_tokenizer()
    words.pad_token = None
    with pytest.raises(ValueError, match=r"Set tokenizer.pad_token = tokenizer.eos_token"):
        evaluate_nlu(model, words, "cola", [{"sentence": "A", "label": 1}])
