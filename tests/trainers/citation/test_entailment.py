"""Judges of entailment: transformers models against one pair at a time, the cache, and what a judge is worth."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dynamic.citations import entailment
from peft_dynamic.citations.entailment import EntailmentCache, EntailmentModel, measure_entailment
from peft_dynamic.citations.evaluate import evaluate_citations

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", "1", "0", "premise", "hypothesis", ":", *"abcdefgh"]


def tokenizer(pair: str, single: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, ids[word]) for word in ("[CLS]", "[SEP]", "</s>")]
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>")


@pytest.fixture(scope="module")
def classifier() -> tuple[Any, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    labels = {"id2label": {0: "contradiction", 1: "neutral", 2: "ENTAILMENT"}}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, initializer_range=0.25, **labels, **sizes)
    pair = "[CLS] $A:0 [SEP]:0 $B:1 [SEP]:1"
    return BertForSequenceClassification(config).eval(), tokenizer(pair, "[CLS] $A [SEP]")


PREMISES = ["a b c", "a", "h g f e d c b a", "b b", "a b c"]
HYPOTHESES = ["b", "c d e", "a", "b", "d"]


def test_a_classifier_judges_in_batches_as_one_by_one(classifier: tuple[Any, Any]) -> None:
    model, reads = classifier
    judge = EntailmentModel(model, reads, batch_size=2)
    expected = [
        model(**reads(premise, hypothesis, return_tensors="pt")).logits.softmax(-1)[0, 2].item()
        for premise, hypothesis in zip(PREMISES, HYPOTHESES, strict=True)
    ]
    assert max(expected) - min(expected) > 0.1
    assert judge(PREMISES, HYPOTHESES) == pytest.approx(expected, abs=1e-6)
    assert (judge.max_length, judge.truncated, judge.comparable) == (16, 0, False)
    assert EntailmentModel(model, reads, support_label=0)(["a"], ["b"])[0] == pytest.approx(
        model(**reads("a", "b", return_tensors="pt")).logits.softmax(-1)[0, 0].item(), abs=1e-6
    )
    assert EntailmentModel(model, reads, support_label="Neutral").support_index == 1
    assert judge([], []) == []


def test_a_long_premise_is_cut_and_counted_and_the_hypothesis_is_not(classifier: tuple[Any, Any]) -> None:
    model, reads = classifier
    judge = EntailmentModel(model, reads, max_length=8)
    # 8 tokens: three special ones, "a b" and what is left of the premise.
    cut, whole = judge(["c d e f g h", "c d e"], ["a b", "a b"])
    assert cut == pytest.approx(whole)
    assert judge.truncated == 1
    assert judge(["d d e f g h"], ["a b"])[0] != pytest.approx(cut)
    with pytest.raises(
        ValueError, match="a hypothesis of 9 tokens leaves no room for a premise in max_length=8: 'a b c d e"
    ):
        judge(["a"], ["a b c d e f"])
    rows = [{"question": "", "output": "a b [1].", "passages": ["c d e f g h"]}]
    found = evaluate_citations(rows, judge, splitter=lambda text: [text], progress=False)
    assert "The judge cut 1 premises to fit into 8 tokens." in found.notes


def test_a_judge_leaves_its_model_as_it_was(classifier: tuple[Any, Any]) -> None:
    model, reads = classifier
    judge = EntailmentModel(model, reads)
    model.train()
    first = judge(PREMISES, HYPOTHESES)
    assert model.training
    assert judge(PREMISES, HYPOTHESES) == first  # dropout is off while it judges
    model.eval()


@pytest.fixture(scope="module")
def generator() -> tuple[Any, Any]:
    """A T5 that answers "1" where a letter stands twice, as a hypothesis of its premise does, and "0" elsewhere.

    Set by hand, so that it answers alike on every machine. A token is one entry of the width; of the spare ones, 20
    says in the encoder that the letter stands elsewhere too. Attention adds nothing but what is written here.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 8, "num_layers": 1, "num_heads": 1, "dropout_rate": 0.0}
    config = T5Config(vocab_size=len(WORDS), decoder_start_token_id=0, pad_token_id=0, eos_token_id=4, **sizes)
    model = T5ForConditionalGeneration(config)
    at = {word: i for i, word in enumerate(WORDS)}
    twice = 20
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "layer_norm" in name else 0.0)
        model.shared.weight.copy_(torch.eye(len(WORDS), 32))
        reads = model.encoder.block[0].layer[0].SelfAttention
        reads.relative_attention_bias.weight[0] = -1000.0  # no token looks at itself
        for i, letter in enumerate("abcdefgh"):  # but at the same letter, and failing that at a colon, which says 0
            reads.q.weight[i, at[letter]] = reads.k.weight[i, at[letter]] = reads.v.weight[0, at[letter]] = 1.0
        reads.q.weight[8] = 1.0
        reads.k.weight[8, at[":"]] = 0.5
        reads.o.weight[twice, 0] = 10.0
        answers = model.decoder.block[0].layer[0].SelfAttention
        answers.relative_attention_bias.weight[0] = 1000.0  # here each looks at itself: "0" comes first, then the end
        answers.v.weight[0, at["[PAD]"]] = answers.v.weight[1, [at["0"], at["1"]]] = 1.0
        answers.o.weight[at["0"], 0], answers.o.weight[at["</s>"], 1] = 1.0, 10.0
        finds = model.decoder.block[0].layer[1].EncDecAttention  # unless a letter stands twice
        finds.q.weight[0, [at["[PAD]"], at["0"], at["1"], at["</s>"]]] = finds.k.weight[0, twice] = 1.0
        finds.v.weight[0, twice] = 1.0
        finds.o.weight[at["1"], 0] = 2.0
        model.decoder.final_layer_norm.weight.fill_(10.0)
    return model.eval(), tokenizer("$A $B", "$A </s>")


def test_the_t5_is_sure_of_its_answers(generator: tuple[Any, Any]) -> None:
    """What the tests below rest on: no answer is near 0.5, so no rounding turns it over."""
    judge = EntailmentModel(*generator)
    for letter in "abcdefgh":
        assert min(judge(["a b c d e f g h", letter], [letter] * 2)) > 0.9
        assert judge([" ".join("abcdefgh".replace(letter, ""))], [letter])[0] < 0.1


def test_a_t5_is_asked_as_true_is(generator: tuple[Any, Any]) -> None:
    model, reads = generator
    judge = EntailmentModel(model, reads, batch_size=3)
    premises, hypotheses = ["a b c", "d e f", "g h a", "b", "c d", "a b c d e f g"], ["a", "a", "h", "b", "e", "f"]
    expected = []
    for premise, hypothesis in zip(premises, hypotheses, strict=True):
        asked = reads(f"premise: {premise} hypothesis: {hypothesis}", return_tensors="pt")
        answer = model.generate(**asked, max_new_tokens=10, do_sample=False)
        expected.append(reads.decode(answer[0], skip_special_tokens=True) == "1")
    assert expected[:3] == [True, False, True]
    likely = judge(premises, hypotheses)
    assert [p >= 0.5 for p in likely] == expected
    first = model(
        **reads("premise: a b c hypothesis: a", return_tensors="pt"), decoder_input_ids=torch.zeros(1, 1).long()
    )
    assert likely[0] == pytest.approx(first.logits[0, 0, [5, 6]].softmax(-1)[0].item(), abs=1e-5)
    assert judge.max_length is None


def test_an_answer_that_is_neither_1_nor_0_is_no_support(generator: tuple[Any, Any]) -> None:
    model, reads = generator
    judge = EntailmentModel(model, reads)
    assert judge(["a b c"], ["a"])[0] > 0.5
    bias = torch.zeros(len(WORDS))
    bias[WORDS.index("a")] = 1e4  # "a" is more likely than either
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output + bias)
    try:
        assert judge(["a b c"], ["a"]) == [0.0]
    finally:
        handle.remove()


def test_another_question_and_other_answers(generator: tuple[Any, Any]) -> None:
    model, reads = generator
    plain, other = EntailmentModel(model, reads), EntailmentModel(model, reads, answers=["0", "1"])
    assert [p >= 0.5 for p in plain(["a b c"] * 2, ["a", "d"])] == [True, False]
    assert [p >= 0.5 for p in other(["a b c"] * 2, ["a", "d"])] == [False, True]
    template = "hypothesis: a premise: {premise} hypothesis: {hypothesis}"
    asked = EntailmentModel(model, reads, template=template)
    assert (
        asked.encode("b {hypothesis}", "c d")["input_ids"]
        == reads("hypothesis: a premise: b {hypothesis} hypothesis: c d")["input_ids"]
    )
    assert len({judge.fingerprint() for judge in (plain, other, asked)}) == 3
    # A model may say in its configuration how it is to be asked.
    model.config.update({"entailment_template": template, "entailment_answers": ["0", "1"]})
    try:
        assert EntailmentModel(model, reads).template == template
        assert EntailmentModel(model, reads).answers == ("0", "1")
    finally:
        del model.config.entailment_template, model.config.entailment_answers
    for wrong in ("{hypothesis} {premise}", "{premise}", "{premise} {premise} {hypothesis}"):
        with pytest.raises(ValueError, match=r"it must have {premise} and then {hypothesis}, each once"):
            EntailmentModel(model, reads, template=wrong)
    for answers in (["1"], ["1", "1"], ["unknown", "words"]):
        with pytest.raises(ValueError, match="they must be two that begin with different tokens"):
            EntailmentModel(model, reads, answers=answers)


def test_a_t5_cuts_the_premise_where_it_is_told_to(generator: tuple[Any, Any]) -> None:
    model, reads = generator
    judge = EntailmentModel(model, reads, max_length=9)
    # Of 9 tokens "premise :" are two, "hypothesis : a </s>" four: three letters are left.
    assert judge(["b c d a", "b c d"], ["a", "a"]) == pytest.approx([judge(["b c d"], ["a"])[0]] * 2, abs=1e-6)
    assert judge.truncated == 1


def test_models_from_a_folder(tmp_path: Path, classifier: tuple[Any, Any], generator: tuple[Any, Any]) -> None:
    for name, (model, reads) in {"bert": classifier, "t5": generator}.items():
        model.save_pretrained(tmp_path / name)
        reads.save_pretrained(tmp_path / name)
        judge = EntailmentModel(tmp_path / name)
        assert judge.name == name
        assert judge(["a b"], ["a"]) == pytest.approx(EntailmentModel(model, reads)(["a b"], ["a"]), abs=1e-5)
    rows = [{"question": "", "output": "a [1]", "passages": ["a b"]}]
    found = evaluate_citations(
        rows, tmp_path / "t5", splitter=lambda text: [text], cache=tmp_path / "c", progress=False
    )
    assert found.scores["citation_recall[judge=t5, sentences=given]"] == 100
    assert len((tmp_path / "c").read_text().split()) == 2
    classifier[0].bert.save_pretrained(tmp_path / "base")
    classifier[1].save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"is a .'BertModel'., whose classifier would be drawn at random"):
        EntailmentModel(tmp_path / "base")


def test_bad_models(classifier: tuple[Any, Any]) -> None:
    model, reads = classifier
    with pytest.raises(ValueError, match="a loaded model needs its tokenizer too"):
        EntailmentModel(model)
    with pytest.raises(ValueError, match="batch_size is 0"):
        EntailmentModel(model, reads, batch_size=0)
    with pytest.raises(ValueError, match=r"none of the model's classes .* is called maybe"):
        EntailmentModel(model, reads, support_label="maybe")
    with pytest.raises(ValueError, match="support_label=3 is no class of the model"):
        EntailmentModel(model, reads, support_label=3)


class Counting:
    def __init__(self, version: str) -> None:
        self.version, self.pairs = version, 0

    def fingerprint(self) -> str:
        return self.version

    def __call__(self, premises: Sequence[str], hypotheses: Sequence[str]) -> list[float]:
        self.pairs += len(premises)
        return [len(premise) / 10 for premise in premises]


def test_the_cache_asks_once(tmp_path: Path) -> None:
    judge, path = Counting("one"), tmp_path / "folder" / "answers.jsonl"
    cache = EntailmentCache(judge, path)
    assert cache(["ab", "c", "ab"], ["x", "x", "x"]) == [0.2, 0.1, 0.2]
    assert cache(["ab", "ab"], ["x", "y"]) == [0.2, 0.2]
    assert (judge.pairs, cache.asked) == (3, 3)
    again = Counting("one")
    assert EntailmentCache(again, path)(["c", "ab"], ["x", "y"]) == [0.1, 0.2]
    assert again.pairs == 0
    # Another judge's answers are not taken for its own.
    other = Counting("two")
    assert EntailmentCache(other, path)(["c"], ["x"]) == [0.1]
    assert other.pairs == 1


def test_the_cache_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    EntailmentCache(Counting("one"), path)(["a", "bc"], ["x", "x"])
    path.write_text(path.read_text()[:-3])
    judge = Counting("one")
    assert EntailmentCache(judge, path)(["a", "bc"], ["x", "x"]) == [0.1, 0.2]
    assert judge.pairs == 1
    judge = Counting("one")
    assert EntailmentCache(judge, path)(["a", "bc"], ["x", "x"]) == [0.1, 0.2]
    assert judge.pairs == 0


def test_a_plain_callable_needs_a_name_to_be_kept_by(tmp_path: Path) -> None:
    def judge(premises: Sequence[str], hypotheses: Sequence[str]) -> torch.Tensor:
        return torch.ones(len(premises)).bool()

    with pytest.raises(ValueError, match="nothing tells its answers from another's"):
        EntailmentCache(judge, tmp_path / "c")
    cache = EntailmentCache(judge, tmp_path / "c", fingerprint="mine, 1")
    assert cache(["a"], ["b"]) == [1.0]
    rows = [{"question": "", "output": "a [1]", "passages": ["a"]}]
    assert "citation_recall[judge=judge]" in evaluate_citations(rows, cache, task="qampari", progress=False).scores
    with pytest.raises(ValueError, match="entailment is an EntailmentCache, which has its own"):
        evaluate_citations(rows, cache, cache=tmp_path / "d", progress=False)


def test_fingerprints_tell_weights_and_limits_apart(classifier: tuple[Any, Any]) -> None:
    model, reads = classifier
    first = EntailmentModel(model, reads).fingerprint()
    assert EntailmentModel(model, reads).fingerprint() == first
    assert EntailmentModel(model, reads, max_length=8).fingerprint() != first
    assert EntailmentModel(model, reads, support_label=0).fingerprint() != first
    with torch.no_grad():
        model.classifier.bias += 1
    try:
        assert EntailmentModel(model, reads).fingerprint() != first
    finally:
        with torch.no_grad():
            model.classifier.bias -= 1


def test_only_true_as_alce_runs_it_is_comparable(generator: tuple[Any, Any]) -> None:
    model, reads = generator
    rows = [{"question": "", "output": "a [1]", "passages": ["a b"], "claims": ["a"]}]
    name = model.config.name_or_path
    model.config.name_or_path = entailment.TRUE_MODEL
    try:
        options: dict[str, Any] = {"task": "qampari", "progress": False}  # which needs no sentence splitter
        found = evaluate_citations(rows, EntailmentModel(model, reads), **options)
        assert {"citation_recall", "citation_precision", "claim_recall"} <= found.scores.keys()
        assert not found.notes
        found = evaluate_citations(rows, EntailmentModel(model, reads, max_length=32), **options)
        assert "claim_recall[judge=t5_xxl_true_nli_mixture]" in found.scores
    finally:
        model.config.name_or_path = name


def test_measures_by_hand() -> None:
    said = [0.9, 0.4, 0.4, 0.4, 0.1]
    labels = [True, True, True, False, False]
    found = measure_entailment(lambda premises, hypotheses: said, ["p"] * 5, ["h"] * 5, labels)
    # Of the six couples, 0.9 wins two, and each 0.4 wins one and ties one.
    assert found == {"auc": pytest.approx(5 / 6), "balanced_accuracy": pytest.approx((1 / 3 + 1) / 2), "rows": 5}
    with pytest.raises(ValueError, match="3 of 3 labels are support; both kinds are needed"):
        measure_entailment(lambda premises, hypotheses: said[:3], ["p"] * 3, ["h"] * 3, labels[:3])


def test_cache_file_is_json_lines(tmp_path: Path) -> None:
    EntailmentCache(Counting("one"), tmp_path / "c")(["a"], ["x"])
    key, answer = json.loads((tmp_path / "c").read_text())
    assert (len(key), answer) == (64, 0.1)
