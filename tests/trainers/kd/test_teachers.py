"""Teachers inside the student's own weights, and what is refused, before any training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedTokenizerFast

from peft_dynamic import ActivationDensityLoss, DyLoRAConfig, LorettaRepConfig
from peft_dynamic.trainers import Distiller, KDConfig, KDTrainer
from tests.trainers.kd.common import MODELS, assert_same, batch, causal, classifier, rows, seq2seq, trainer, weights

TARGETS: dict[str, Any] = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
LORA = {**TARGETS, "r": 4, "init_lora_weights": False}
ONLY = {"kd_weight": 1.0}


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**batch(), "labels": None}, **more).logits


def kl(student: torch.Tensor, teacher: torch.Tensor) -> float:
    p, q = log_softmax(student, 1), log_softmax(teacher, 1)
    return kl_div(p, q, reduction="batchmean", log_target=True).item()


def student(config: Any = None, **more: Any) -> Any:
    torch.manual_seed(7)
    return get_peft_model(classifier(0, **more), LoraConfig(**LORA) if config is None else config)


def with_a_teacher(**more: Any) -> Any:
    """A student of rank 1 beside a teacher of rank 4 on the same base, with the same head."""
    model = student(**more)
    model.add_adapter("big", LoraConfig(**{**LORA, "r": 8}))
    return model


def test_the_base_teaches() -> None:
    model = student().eval()
    with model.disable_adapter():
        taught = logits(model)
    loss = Distiller(model, "base", KDConfig(**ONLY))(batch())
    assert loss.item() == pytest.approx(kl(logits(model), taught), rel=1e-4)


def test_another_adapter_teaches() -> None:
    model = with_a_teacher().eval()
    model.set_adapter("big")
    taught = logits(model)
    model.set_adapter("default")
    distiller = Distiller(model, "adapter:big", KDConfig(**ONLY))
    assert distiller(batch()).item() == pytest.approx(kl(logits(model), taught), rel=1e-4)


@pytest.mark.parametrize("teacher", ["base", "adapter:big", "ema"])
def test_a_shared_teacher_leaves_the_student_as_it_was(teacher: str) -> None:
    model = with_a_teacher(dropout=0.5)
    model.train()
    model.base_model.model.bert.embeddings.eval()  # a mode of its own stays too
    distiller = Distiller(model, teacher)

    def state() -> Any:
        switches = [getattr(module, "disable_adapters", None) for module in model.modules()]
        modes = [module.training for module in model.modules()]
        return modes, switches, model.active_adapter, [p.requires_grad for p in model.parameters()]

    before, numbers = state(), weights(model)
    distiller(batch()).backward()
    assert state() == before
    assert_same(weights(model), numbers)
    broken = {**batch(), "input_ids": torch.full((4, 6), 10**6)}  # an error in the teacher's pass
    with pytest.raises(IndexError):
        distiller(broken)
    assert state() == before
    assert_same(weights(model), numbers)


def test_the_teaching_adapter_is_not_trained(tmp_path: Path) -> None:
    """One that add_adapter made would be trained, and decay."""
    model = with_a_teacher()
    before = {name: value for name, value in weights(model).items() if ".big." in name}
    assert before
    made = trainer(tmp_path, "adapter:big", model, weight_decay=0.5)
    made.train()
    assert_same({name: value for name, value in weights(model).items() if ".big." in name}, before)
    optimizer = made.optimizer
    assert optimizer is not None
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for name, p in model.named_parameters() if ".big." in name}


def test_a_method_learns_from_an_adapter_of_another(tmp_path: Path) -> None:
    """LoRETTA_rep from a LoRA over the same base, whose weights are in memory once."""
    classifier(0).save_pretrained(tmp_path / "base")
    load = type(classifier(0)).from_pretrained
    get_peft_model(load(tmp_path / "base"), LoraConfig(**{**LORA, "r": 8})).save_pretrained(tmp_path / "big")
    config = LorettaRepConfig(bottleneck=4, tensor_rank=2, **TARGETS, train_layer_norms=False)
    model = get_peft_model(load(tmp_path / "base"), config)
    made = trainer(tmp_path / "out", tmp_path / "big", model, max_steps=60, **ONLY)
    teacher: Any = made.distiller.teacher
    taught = teacher.at(0.0)
    pointers = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    base = {name: p for name, p in taught.named_parameters() if "lora_" not in name and "modules_to_save" not in name}
    own = [name for name, p in base.items() if p.data_ptr() not in pointers]
    assert not own
    alone = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "big").eval()
    torch.testing.assert_close(logits(taught), logits(alone))
    made.train()
    values = [log["kd"] for log in made.state.log_history if "kd" in log]
    assert sum(values[-8:]) < 0.5 * sum(values[:8])
    torch.testing.assert_close(logits(taught), logits(alone))  # the student's training is not the teacher's


def test_the_full_rank_teaches_the_lower_ones(tmp_path: Path) -> None:
    model = student(DyLoRAConfig(**LORA, rank_sampling="uniform", ranks=[1, 4]))
    made = trainer(tmp_path, "full_rank", model, max_steps=12, kd_weight=0.5)
    drawn: list[int] = []
    compute = made.distiller.compute

    def noted(*args: Any, **kwargs: Any) -> Any:
        drawn.append(model.base_model.drawn_rank())
        found = compute(*args, **kwargs)
        assert ("kd" in found.sums) == (drawn[-1] < 4)
        assert model.base_model.drawn_rank() == drawn[-1]
        return found

    made.distiller.compute = noted
    made.train()
    assert set(drawn) == {1, 4}
    torch.manual_seed(7)
    alone = student(DyLoRAConfig(**LORA, rank_sampling="uniform", ranks=[1, 4]))
    plain: list[int] = []
    other = trainer(tmp_path, None, alone, max_steps=12)
    whole = other.distiller.compute

    def watched(*args: Any, **kwargs: Any) -> Any:
        plain.append(alone.base_model.drawn_rank())
        return whole(*args, **kwargs)

    other.distiller.compute = watched
    other.train()
    assert drawn == plain  # the draws are DyLoRA's own


def test_what_the_full_rank_says() -> None:
    model = student(DyLoRAConfig(**LORA, rank_sampling=[1.0, 0.0], ranks=[1, 4]))
    model.train()
    loss = Distiller(model, "full_rank", KDConfig(**ONLY))(batch())
    with model.base_model.at_rank(1):
        low = logits(model.eval())
    with model.base_model.at_rank(4):
        full = logits(model)
    assert loss.item() == pytest.approx(kl(low, full), rel=1e-4)


@pytest.mark.parametrize("weight", [0.5, "steps 0:0 0.5:0.5"])  # also where nobody asks it at first
def test_the_running_mean_is_the_formula(weight: float | str, tmp_path: Path) -> None:
    model = classifier(0)
    made = trainer(tmp_path, "ema", model, ema_decay=0.75, optim="sgd", kd_weight=weight)
    seen = [weights(model)]
    step = made.distiller.updated

    def noted() -> None:
        seen.append(weights(model))
        step()

    made.distiller.updated = noted
    made.train()
    mean = {name: value.float() for name, value in seen[0].items()}
    for each in seen[1:]:
        mean = {name: 0.75 * mean[name] + 0.25 * value for name, value in each.items()}
    found = made.distiller.teacher.state()
    for name, value in found.items():
        torch.testing.assert_close(value, mean[name])


def test_density_counts_the_students_pass_alone(tmp_path: Path) -> None:
    from peft_dynamic import measure_density

    def made(teacher: Any) -> KDTrainer:
        model = classifier(0, 2, hidden_act="relu")
        ActivationDensityLoss(weight=0.1).attach(model)
        return trainer(tmp_path, teacher, model, kd_weight=1e-12)

    logs = []
    for teacher in (None, "ema"):
        run = made(teacher)
        run.train()
        logs.append([log["density_loss"] for log in run.state.log_history if "density_loss" in log])
    assert logs[0]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert measure_density is not None


def tokens(*extra: str) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(40)} | {word: 40 + i for i, word in enumerate(extra)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w1")


def test_vocabularies_that_differ_in_padding_only(tmp_path: Path) -> None:
    teacher, model = causal(1, 2, vocab_size=56), causal(0)
    teacher.save_pretrained(tmp_path / "teacher")
    tokens().save_pretrained(tmp_path / "teacher")
    with pytest.warns(UserWarning, match="over the first 50"):
        made = trainer(tmp_path / "out", tmp_path / "teacher", model, "causal", processing_class=tokens(), **ONLY)
    inputs = batch("causal")
    loss = made.distiller(inputs)
    keep = inputs["labels"][:, 1:] != -100
    with torch.no_grad():
        z, t = (each(**inputs).logits[:, :-1][keep] for each in (model, teacher))
    assert loss.item() == pytest.approx(kl(z, t[:, :50]), rel=1e-4)
    with pytest.raises(ValueError, match=r"vocab_size 50 and the teacher 56.*pass processing_class"):
        Distiller(model, teacher)
    tokens("other").save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="other tokens than the student's"):
        trainer(tmp_path / "out", tmp_path / "teacher", model, "causal", processing_class=tokens("one"))


def named(*names: str, seed: int = 0) -> Any:
    return classifier(seed, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def own_weights() -> Any:
    model = classifier(0)
    return Distiller(model, model)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other classes": (lambda _: Distiller(classifier(0), classifier(1, classes=2)), "num_labels.*3 classes.*2"),
    "another order": (lambda _: Distiller(named("a", "b", "c"), named("b", "a", "c", seed=1)), "id2label"),
    "another task": (lambda _: Distiller(classifier(0), causal(1)), "same task"),
    "no known task": (lambda _: Distiller(classifier(0).bert), "what its labels mean is not known"),
    "itself": (lambda _: own_weights(), "shares trained weights"),
    "a word": (lambda _: Distiller(classifier(0), "nowhere/at-all"), "nowhere/at-all.*no AutoModelForSequence"),
    "an object": (lambda _: Distiller(classifier(0), 3), "teacher=3: must be None, 'smoothing'"),
    "an empty list": (lambda _: Distiller(classifier(0), []), "at least one"),
    "a formula in a list": (lambda _: Distiller(classifier(0), ["smoothing"]), "must hold models or paths"),
    "weight 0": (lambda _: Distiller(classifier(0), classifier(1), KDConfig(kd_weight=0)), "Leave teacher out"),
    "base of no adapter": (lambda _: Distiller(classifier(0), "base"), "needs a PeftModel"),
    "the trained adapter": (lambda _: Distiller(student(), "adapter:default"), "must name an adapter.*not trained"),
    "no such adapter": (lambda _: Distiller(student(), "adapter:big"), "must name an adapter"),
    "biases": (lambda _: Distiller(student(LoraConfig(**LORA, bias="all")), "base"), "move with the student"),
    "full rank of LoRA": (lambda _: Distiller(student(), "full_rank"), "draws ranks"),
    "full rank alone": (
        lambda _: Distiller(student(DyLoRAConfig(r=4, target_modules=["query"])), "full_rank"),
        "rank_sampling='full'",
    ),
    "switches of one": (
        lambda _: Distiller(classifier(0), classifier(1), KDConfig(teacher_switches=[0.5])),
        "for 2 teachers, and teacher has one",
    ),
    "switches of three": (
        lambda _: Distiller(classifier(0), [classifier(1)] * 3, KDConfig(teacher_switches=[0.5])),
        "for 2 teachers, and teacher has 3",
    ),
    "prompt learning": (
        lambda _: Distiller(
            get_peft_model(causal(0), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")), "smoothing"
        ),
        "prompt learning",
    ),
    "smoothing of numbers": (lambda _: Distiller(classifier(0, classes=1), "smoothing"), "is for classes"),
    "temperature of numbers": (
        lambda _: Distiller(classifier(0, classes=1), classifier(1, classes=1), KDConfig(temperature=2.0)),
        "a number has none",
    ),
    "several labels": (
        lambda _: Distiller(classifier(0, problem_type="multi_label_classification")),
        "a row must have one label",
    ),
    "twice smoothed": (lambda path: trainer(path, "smoothing", label_smoothing_factor=0.1), "teacher='smoothing'"),
    "bits": (lambda _: Distiller(classifier(0), classifier(1), teacher_quantization="int3"), "'nf4' or None"),
    "router": (
        lambda _: Distiller(causal(0, output_router_logits=True, router_aux_loss_coef=0.1)),
        "output_router_logits=False",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_before_training(name: str, tmp_path: Path) -> None:
    run, text = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=text):
        run(tmp_path)


def test_a_loss_of_its_own_is_refused_at_the_first_batch() -> None:
    class Weighted(type(classifier(0))):
        def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            if labels is not None:
                found.loss = 3 * cross_entropy(found.logits, labels)
            return found

    model = Weighted(classifier(0).config).eval()
    with pytest.raises(ValueError, match=r"Weighted gives the loss .* trains with another loss"):
        Distiller(model, classifier(1))(batch())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"kd_weight": 1.5}, "kd_weight=1.5: must be from 0 to 1"),
    ({"kd_weight": "0:0 1:2"}, "kd_weight='0:0 1:2': must be from 0 to 1"),
    ({"kd_weight": "half"}, "kd_weight='half'.*such as"),
    ({"temperature": 0}, "temperature=0: must be greater than 0"),
    ({"temperature": "0:1 1:0"}, "greater than 0"),
    ({"teacher_scale": -1}, "teacher_scale=-1"),
    ({"divergence": "kl"}, "divergence='kl': must be one of forward_kl"),
    ({"margin": -1, "divergence": "hinge"}, "margin=-1"),
    ({"margin": 1.0}, "margin=1.0 is the hinge's"),
    ({"divergence": "mse", "temperature": 2.0}, "compares logits, not softmaxes"),
    ({"smoothing": 0}, "smoothing=0: must be a number greater than 0"),
    ({"smoothing": 1.0}, "smoothing=1.0"),
    ({"ema_decay": 1.0}, "ema_decay=1.0"),
    ({"teacher_switches": [0.5, 0.2]}, "teacher_switches"),
    ({"teacher_switches": [0]}, "teacher_switches"),
    ({"teacher_switches": 0.5}, "teacher_switches"),
]


@pytest.mark.parametrize(("settings", "text"), BAD)
def test_settings_without_meaning(settings: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        KDConfig(**settings)


@pytest.mark.parametrize("counts", [{"k": 0}, {"m": 0}, {"tau_max": 2.5}, {"tau_max": True}])
def test_presets_count(counts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        KDConfig.annealing(**counts)


def test_other_training_arguments_become_a_config(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), learning_rate=3e-4, report_to=[], use_cpu=True)
    made = KDTrainer(classifier(0), None, args, train_dataset=Dataset.from_list(rows()))
    assert (made.args.learning_rate, made.args.kd_weight) == (3e-4, 0.5)


def test_every_task_has_a_teacher_of_its_kind() -> None:
    assert set(MODELS) == {"sequence", "tokens", "masked", "seq2seq", "causal"}
    assert Distiller(seq2seq(0), seq2seq(1, 2)).task == "seq2seq"
