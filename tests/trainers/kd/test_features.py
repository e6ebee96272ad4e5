"""Inner states as a term of the loss: by hand, whatever the padding, widths and heads, and exact on resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from peft_dynamic.functional.features import cosine, hidden, relations
from peft_dynamic.trainers import Distiller, KDConfig
from peft_dynamic.trainers.kd.features import attentions, pairs_of
from tests.trainers.kd.common import (
    SETTINGS,
    WORDS,
    assert_same,
    batch,
    causal,
    classifier,
    masked,
    rows,
    seq2seq,
    trainer,
    weights,
)

ALL = {"relations": 0.7, "hidden": 0.3, "cosine": 0.5}


def wide(seed: int = 1, layers: int = 3, **more: Any) -> Any:
    """A teacher of twice the student's width, with other heads."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_labels": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=WORDS, num_hidden_layers=layers, **{**sizes, **dropout, **more})
    return BertForSequenceClassification(config).eval()


def test_relations_by_hand() -> None:
    """One head; the teacher's X is the unit matrix, the student's the column (1, 0).

    R_T has the rows softmax(1/sqrt 2, 0) = (.66976, .33024) and its mirror; R_S softmax(1, 0) = (.73106, .26894) and
    (.5, .5). KL = .66976 ln(.66976/.73106) + .33024 ln(.33024/.26894) = .00915, and .05880; their mean is .033976.
    """
    student, teacher = torch.tensor([[[1.0], [0.0]]]), torch.eye(2)[None]
    found = relations(student, teacher, 1, torch.ones(1, 2, dtype=torch.bool))
    assert found.item() == pytest.approx(0.0339763, abs=1e-7)
    # causal: the first token sees itself alone, so its relation is 1 for both
    last = relations(student, teacher, 1, torch.ones(1, 2, dtype=torch.bool), causal=True)
    assert last.item() == pytest.approx(0.0588 / 2, abs=1e-5)


def test_states_by_hand() -> None:
    student, teacher = (
        torch.tensor([[[1.0, 0.0], [3.0, 4.0], [9.0, 9.0]]]),
        torch.tensor([[[0.0, 1.0], [3.0, 0.0], [0.0, 0.0]]]),
    )
    mask = torch.tensor([[True, True, False]])
    assert hidden(student, teacher, mask).item() == pytest.approx((1 + 8) / 2)
    assert cosine(student, teacher, mask).item() == pytest.approx((1 + 0.4) / 2)
    for term in (hidden, cosine):
        assert term(student, teacher, torch.zeros(1, 3, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_on_either_side_or_none(is_causal: bool) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 12)
    whole = torch.ones(2, 4, dtype=torch.bool)
    for term in (lambda s, t, m: relations(s, t, 3, m, is_causal), lambda s, t, m: hidden(s, t[..., :6], m)):
        wanted = term(student, teacher, whole)
        for left, right in ((3, 0), (0, 2), (1, 4)):
            one, other = (torch.nn.functional.pad(x, (0, 0, left, right), value=7.0) for x in (student, teacher))
            found = term(one.requires_grad_(), other, torch.nn.functional.pad(whole, (left, right)))
            torch.testing.assert_close(found, wanted)
            (gradient,) = torch.autograd.grad(found.sum(), one)
            assert torch.isfinite(gradient).all()
            assert gradient[:, :left].abs().sum() == 0


def plain(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """States, and the inputs of each layer's three projections times their weights, without hooks."""
    bare = {name: value for name, value in inputs.items() if name != "labels"}
    found = model(**bare, output_hidden_states=True)
    layers = model.bert.encoder.layer
    parts = [
        [getattr(layer.attention.self, name)(found.hidden_states[i]) for name in ("query", "key", "value")]
        for i, layer in enumerate(layers)
    ]
    return found.hidden_states, parts


def test_the_loss_is_the_formula() -> None:
    student, teacher, inputs = classifier(0, 2), wide(), batch()
    inputs["attention_mask"][1, 4:] = 0
    taught = weights(teacher)
    config = KDConfig(kd_weight=0.3, features=ALL, layer_map="1:1 2:3", relation_heads=4)
    distiller = Distiller(student, teacher, config)
    found = distiller.compute(inputs)
    bare = Distiller(student, teacher, KDConfig(kd_weight=0.3))(inputs)
    (z, one), (t, other) = plain(student, inputs), plain(teacher, inputs)
    mask = inputs["attention_mask"].bool()
    assert distiller.features is not None
    first, second = distiller.features.projections
    states = [(first(z[1]), t[1]), (second(z[2]), t[3])]
    values = {
        "hidden": torch.stack([hidden(*pair, mask) for pair in states]).mean(0),
        "relations": torch.stack(
            [sum(relations(s, x, 4, mask) for s, x in zip(one[i], other[j], strict=True)) for i, j in ((0, 0), (1, 2))]
        ).mean(0),
    }
    kept = (1 - cosine_similarity(*states[0], dim=-1)) + (1 - cosine_similarity(*states[1], dim=-1))
    values["cosine"] = (kept * mask).sum(1) / 2 / mask.sum(1)
    for name in ALL:
        assert found.sums[name].item() == pytest.approx(values[name].sum().item(), rel=1e-4)
    wanted = bare + sum(ALL[name] * found.sums[name] / 4 for name in ALL)
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    found.loss.backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert_same(weights(teacher), taught)
    watched = [module for model in (student, teacher) for layer in attentions(model) for module in layer]
    assert not any(module._forward_hooks for module in watched)
    broken = {**inputs, "input_ids": torch.full((4, 6), 10**6)}
    with pytest.raises(IndexError):
        distiller(broken)
    assert not any(module._forward_hooks for module in watched)


def test_gradients_reach_an_adapter_below() -> None:
    """The relations of the last layer move the adapter of the first; the same where layers are computed again."""
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(classifier(0, 2), config).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        settings = KDConfig(kd_weight=0, features={"relations": 1.0, "hidden": 1.0})
        Distiller(model, "base", settings)({**batch(), "labels": torch.full((4,), -100)}).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if "lora_" in name})
    assert found[0]["base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.default.weight"].abs().sum() > 0
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


@pytest.mark.parametrize(("make", "task"), [(causal, "causal"), (masked, "masked")])
def test_language_models_count_a_row_by_its_labels(make: Any, task: str) -> None:
    student, teacher, inputs = make(0), make(1, 2), batch(task)
    inputs["labels"][0, 3:] = -100
    config = KDConfig(kd_weight=0.5, features={"hidden": 1.0, "relations": 1.0})
    found = Distiller(student, teacher, config).compute(inputs)
    z, t = (each(**inputs, output_hidden_states=True).hidden_states[-1] for each in (student, teacher))
    each = (z - t).square().mean(-1).mean(1)
    counts = (inputs["labels"][:, 1:] if task == "causal" else inputs["labels"]).ne(-100).sum(1)
    assert found.counts["hidden"] == counts.sum()
    assert found.sums["hidden"].item() == pytest.approx((each * counts).sum().item(), rel=1e-4)
    assert found.sums["relations"] > 0


def test_other_families_have_relations() -> None:
    """Fused projections, other names, and a student of another family than its teacher."""
    torch.manual_seed(0)
    small = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=WORDS, dim=16, hidden_dim=16, n_layers=2, n_heads=2, num_labels=3)
    ).eval()
    found = Distiller(small, wide(), KDConfig(features="relations:1", relation_heads=8)).compute(batch())
    assert found.sums["relations"] > 0
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    made = [
        GPT2ForSequenceClassification(
            GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, num_labels=3, n_inner=16, **ends)
        ).eval()
        for _ in range(2)
    ]
    assert [len(layer) for layer in attentions(made[0])] == [1, 1]
    distiller = Distiller(*made, KDConfig(features="relations:1"))
    assert distiller.compute(batch()).sums["relations"] > 0
    assert Distiller(made[0], made[0].__class__(made[0].config).eval(), KDConfig(features="hidden:1")) is not None
    query_groups = causal(0, num_attention_heads=4, num_key_value_heads=2)
    again = Distiller(query_groups, causal(1, 2), KDConfig(features="relations:1", relation_heads=2))
    assert again.compute(batch("causal")).sums["relations"] > 0


def test_maps_of_layers() -> None:
    assert pairs_of("last", 3, 12) == [(3, 12)]
    assert pairs_of("uniform", 3, 12) == [(1, 4), (2, 8), (3, 12)]
    assert pairs_of("uniform", 2, 3) == [(1, 2), (2, 3)]
    assert pairs_of("skip", 3, 12) == [(1, 4), (2, 8)]
    assert pairs_of("1:2 3:12", 3, 12) == [(1, 2), (3, 12)]


def made_for(folder: Path, **more: Any) -> Any:
    settings = {**SETTINGS, "max_steps": 6, "kd_weight": 0.3, "features": ALL, "layer_map": "uniform", **more}
    student = settings.pop("student", None) or classifier(0, 2, dropout=0.5)
    return trainer(folder, wide(), student, config=KDConfig(str(folder), **settings))


def test_a_resumed_run_is_the_uninterrupted_one_and_the_student_has_no_more(tmp_path: Path) -> None:
    whole = made_for(tmp_path / "whole", save_strategy="steps", save_steps=3)
    before = [p.detach().clone() for p in whole.distiller.parameters()]
    whole.train()
    assert len(before) == 2
    assert all(not torch.equal(p, old) for p, old in zip(whole.distiller.parameters(), before, strict=True))
    assert all(p.grad is None for p in whole.distiller.parameters())
    again = made_for(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(weights(again.model), weights(whole.model))
    for p, other in zip(again.distiller.parameters(), whole.distiller.parameters(), strict=True):
        assert torch.equal(p, other)
    logs = [log for log in whole.state.log_history if "ce" in log]
    for log in logs:
        terms = sum(weight * log[name] for name, weight in ALL.items())
        assert log["loss"] == pytest.approx(0.7 * log["ce"] + 0.3 * log["kd"] + terms, rel=1e-4)
    whole.save_model(str(tmp_path / "saved"))
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == classifier(0, 2).state_dict().keys()
    assert "eval_hidden" not in whole.evaluate(Dataset.from_list(rows()))
    trainer(tmp_path / "other", save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="these features, which have a state of their own"):
        made_for(tmp_path / "third").train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2"))


def test_eight_rows_in_one_part_or_in_four(tmp_path: Path) -> None:
    trained = []
    data = [{**row, "attention_mask": [1] * (3 + i % 4) + [0] * (3 - i % 4)} for i, row in enumerate(rows())]
    for size, parts in ((8, 1), (2, 4)):
        made = made_for(
            tmp_path,
            student=classifier(0, 2),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            optim="sgd",
            max_steps=2,
        )
        made.train_dataset = Dataset.from_list(data)
        made.train()
        trained.append({**weights(made.model), **dict(enumerate(made.distiller.parameters()))})
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-3, atol=1e-5)


def test_the_preset_trains_relations_beside_the_labels(tmp_path: Path) -> None:
    config = KDConfig.minilm(str(tmp_path), relation_heads=4, **{**SETTINGS, "max_steps": 30})
    made = trainer(tmp_path, wide(), classifier(0, 2), config=config)
    assert made.distiller.parameters() == []
    made.train()
    logs = [log for log in made.state.log_history if "relations" in log]
    assert logs[-1]["relations"] < 0.5 * logs[0]["relations"]
    assert logs[3]["loss"] == pytest.approx(logs[3]["ce"] + logs[3]["relations"], rel=1e-4)


def cached(path: Path) -> Any:
    from peft_dynamic.trainers import cache_teacher

    cache_teacher(classifier(1), [batch()], path / "cache")
    return Distiller(classifier(0), f"cache:{path / 'cache'}", KDConfig(features="hidden:1"))


HIDDEN = {"features": {"hidden": 1.0}}
REFUSED: dict[str, tuple[Any, str]] = {
    "a word": (lambda _: KDConfig(features={"logits": 1.0}), "features=.*must have relations, hidden, cosine"),
    "weight 0": (lambda _: KDConfig(features={"hidden": 0}), "weights greater than 0"),
    "no weight": (lambda _: KDConfig(features="hidden"), "such as .*'relations:1 hidden:0.5'"),
    "empty": (lambda _: KDConfig(features={}), "must have relations"),
    "a map alone": (lambda _: KDConfig(layer_map="uniform"), "they are for features"),
    "heads alone": (lambda _: KDConfig(relation_heads=2), "they are for features"),
    "no map": (lambda _: KDConfig(layer_map="first", **HIDDEN), "layer_map='first': must be 'last'"),
    "half a pair": (lambda _: KDConfig(layer_map="1:2 3", **HIDDEN), "or pairs"),
    "heads of nothing": (lambda _: KDConfig(relation_heads=0, features="relations:1"), "relation_heads=0"),
    "no such layer": (
        lambda _: Distiller(classifier(0), classifier(1, 2), KDConfig(layer_map="1:3", **HIDDEN)),
        "student has the layers 1 to 1 and the teacher 1 to 2",
    ),
    "nothing to skip": (
        lambda _: Distiller(classifier(0), classifier(1, 2), KDConfig(layer_map="skip", **HIDDEN)),
        "Use 'last'",
    ),
    "heads that do not divide": (
        lambda _: Distiller(classifier(0), wide(), KDConfig(features="relations:1", relation_heads=3)),
        r"relation_heads=3 must divide .*\[16, 32\].*one of \[1, 2, 4, 8, 16\]",
    ),
    "heads without relations": (
        lambda _: Distiller(classifier(0), wide(), KDConfig(relation_heads=2, **HIDDEN)),
        "relation_heads=2 is of features='relations:1'",
    ),
    "a cache": (cached, "teacher is a cache"),
    "a formula": (lambda _: Distiller(classifier(0), "smoothing", KDConfig(**HIDDEN)), "teacher is 'smoothing'"),
    "nobody": (lambda _: Distiller(classifier(0), None, KDConfig(**HIDDEN)), "teacher is None"),
    "a list": (lambda _: Distiller(classifier(0), [classifier(1)] * 2, KDConfig(**HIDDEN)), "teacher is a list"),
    "two stacks": (lambda _: Distiller(seq2seq(0), seq2seq(1), KDConfig(**HIDDEN)), "encoder-decoder has two"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    run, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        run(tmp_path)
