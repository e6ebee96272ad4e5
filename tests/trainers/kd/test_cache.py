"""A cache answers as the live teacher does, in whatever order, batch and padding; and never with another's target."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from peft_dynamic.trainers import Distiller, KDConfig, cache_teacher
from peft_dynamic.trainers.kd.cache import Cache
from tests.trainers.kd.common import assert_same, batch, causal, classifier, masked, seq2seq, weights
from tests.trainers.kd.common import rows as classified
from tests.trainers.kd.common import trainer as kd
from tests.trainers.kd.test_kd_sft import DATA, trainer
from tests.trainers.soft.common import rows, tokenizer
from tests.trainers.soft.families import build


def fill(folder: Path, teacher: Any, data: Any = None, settings: dict[str, Any] | None = None, **more: Any) -> int:
    """As a user fills it: with the batches of a trainer."""
    made = trainer(folder / "filling", data=data, **(settings or {}))
    return cache_teacher(teacher, made.get_train_dataloader(), folder / "cache", processing_class=tokenizer(), **more)


def test_a_classifiers_logits_are_the_live_ones(tmp_path: Path) -> None:
    teacher = classifier(1, 2)
    live = kd(tmp_path / "live", teacher, max_steps=6)
    loader = live.get_train_dataloader()
    assert cache_teacher(teacher, loader, tmp_path / "cache") == 16
    live.train()
    cached = kd(tmp_path / "cached", f"cache:{tmp_path / 'cache'}", max_steps=6)
    cached.train()
    for name, value in weights(cached.model).items():
        torch.testing.assert_close(value, weights(live.model)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["prompts", "text", "packing", "padding-free"])
@pytest.mark.filterwarnings("ignore:.*[Pp]adding-free.*")
def test_states_train_as_the_live_teacher(kind: str, tmp_path: Path) -> None:
    data, settings = DATA[kind]
    teacher = build("llama", seed=1)
    fill(tmp_path, teacher, data, settings, dtype="float32")
    both = []
    for who in (teacher, f"cache:{tmp_path / 'cache'}"):
        # two epochs, shuffled, in batches of another size than those of the filling
        more = {"per_device_train_batch_size": 2, "max_steps": 8, "temperature": 2.0, "divergence": "jsd", **settings}
        made = trainer(tmp_path / "out", who, data=data, **more)
        made.train()
        both.append(weights(made.model))
    for name, value in both[0].items():
        torch.testing.assert_close(both[1][name], value, rtol=1e-3, atol=1e-4)


def test_how_exact_each_kind_is(tmp_path: Path) -> None:
    teacher = build("llama", seed=1)
    made = trainer(tmp_path / "out", teacher)
    inputs = dict(next(iter(made.get_train_dataloader())))
    labels = inputs.pop("labels")
    keep = labels[:, 1:] != -100
    live: Any = made.distiller.teacher.states(inputs, keep, 0.0)
    z = live.head.logits(live.states)
    bounds = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 5e-2}
    for dtype, bound in bounds.items():
        folder = tmp_path / dtype
        cache_teacher(teacher, [{**inputs, "labels": labels}], folder, dtype=dtype)
        other = trainer(tmp_path / "out", f"cache:{folder}")
        found: Any = other.distiller.teacher.states(inputs, keep, 0.0)
        error = (found.head.logits(found.states) - z).norm() / z.norm()
        assert error < bound, dtype
        assert (error > 0) == (dtype != "float32")
    cache_teacher(teacher, [{**inputs, "labels": labels}], tmp_path / "top", kind="top_k", top_k=3)
    best = Cache(tmp_path / "top")
    top = torch.log_softmax(z, 1).topk(3)
    other = trainer(tmp_path / "out", f"cache:{tmp_path / 'top'}")
    kept: Any = other.distiller.teacher.states(inputs, keep, 0.0)
    torch.testing.assert_close(kept.logprobs, top.values, rtol=1e-4, atol=1e-5)
    assert torch.equal(kept.tokens, top.indices)
    assert best.meta["top_k"] == 3


def test_the_side_of_the_padding_does_not_matter(tmp_path: Path) -> None:
    teacher, student = causal(1, 2), causal(0)
    texts = [torch.arange(2, 7), torch.arange(10, 13)]

    def padded(left: bool) -> dict[str, torch.Tensor]:
        ids, mask, labels = (torch.full((2, 5), value) for value in (0, 0, -100))
        for i, text in enumerate(texts):
            part = slice(5 - len(text), 5) if left else slice(0, len(text))
            ids[i, part], mask[i, part], labels[i, part] = text, 1, text
            labels[i, part.start] = -100
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}

    cache_teacher(teacher, [padded(left=True)], tmp_path / "cache", dtype="float32")
    how = KDConfig(kd_weight=1.0)
    from peft_dynamic.trainers.kd.states import decoder_states, found_decoder

    right = padded(left=False)
    keep = right["labels"][:, 1:] != -100
    found: Any = Distiller(student, f"cache:{tmp_path / 'cache'}", how).teacher
    inputs = {name: value for name, value in right.items() if name != "labels"}
    with torch.no_grad():
        live = decoder_states(found_decoder(teacher), inputs, keep)
    torch.testing.assert_close(found.states(inputs, keep, 0.0).states, live.states, rtol=1e-3, atol=1e-4)


def test_a_fill_goes_on_and_does_no_work_twice(tmp_path: Path) -> None:
    teacher = classifier(1, 2)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    first, second = batch(count=4), batch(count=8)
    assert cache_teacher(teacher, [first], tmp_path / "cache") == 4
    assert cache_teacher(teacher, [first, second], tmp_path / "cache") == 4
    assert len(calls) == 2
    assert len(Cache(tmp_path / "cache").places) == 8
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_second_process_trains_without_the_teacher(tmp_path: Path) -> None:
    import subprocess
    import sys

    teacher = build("llama", seed=1)
    fill(tmp_path, teacher, dtype="float32")
    code = f"""
import torch
from tests.trainers.kd.test_kd_sft import trainer
made = trainer({str(tmp_path / "out")!r}, "cache:" + {str(tmp_path / "cache")!r}, max_steps=2)
made.train()
print("found", [log["kd"] for log in made.state.log_history if "kd" in log])
"""
    root = Path(__file__).parents[3]  # where `tests` is found
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    live = trainer(tmp_path / "live", teacher, max_steps=2)
    live.train()
    found = json.loads(done.stdout.rpartition("found")[2])
    assert found == pytest.approx([log["kd"] for log in live.state.log_history if "kd" in log], rel=1e-4)


def test_what_is_refused(tmp_path: Path) -> None:
    teacher = build("llama", seed=1)
    fill(tmp_path, teacher, kind="top_k", top_k=5)
    where = f"cache:{tmp_path / 'cache'}"
    for settings in ({"temperature": 2.0}, {"divergence": "mse"}, {"teacher_scale": "0:0.5 1:1"}):
        with pytest.raises(ValueError, match="kind='states'"):
            trainer(tmp_path / "out", where, **settings)
    with pytest.raises(ValueError, match="there is no cache"):
        trainer(tmp_path / "out", "cache:nowhere")
    with pytest.raises(ValueError, match=r"another teacher"):
        cache_teacher(build("llama", seed=2), [], tmp_path / "cache", "top_k", 5, processing_class=tokenizer())
    with pytest.raises(ValueError, match="another kind, dtype, top_k"):
        cache_teacher(teacher, [], tmp_path / "cache", "states", processing_class=tokenizer())
    with pytest.raises(ValueError, match="must hold models or paths"):
        Distiller(causal(0), [where])
    changed = rows()
    changed[3]["completion"] += " w7"
    with pytest.raises(ValueError, match=r"nothing of a row.*Fill it"):
        trainer(tmp_path / "out", where, data=changed, num_train_epochs=1, max_steps=-1).train()
    with pytest.raises(ValueError, match="filled by a causal model"):
        Distiller(classifier(0), where)
    cache_teacher(classifier(1, 2), [batch()], tmp_path / "classes")
    with pytest.raises(ValueError, match="3 classes and the student 2"):
        Distiller(classifier(0, classes=2), f"cache:{tmp_path / 'classes'}")
    (tmp_path / "classes" / "meta.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="format 0"):
        Distiller(classifier(0), f"cache:{tmp_path / 'classes'}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("something")
    for model, more, text in (
        (classifier(1), {"kind": "states"}, "must be 'logits'"),
        (teacher, {"kind": "logits"}, "'states' or 'top_k'"),
        (teacher, {"dtype": "int4"}, "dtype='int4'"),
        (teacher, {"kind": "top_k", "top_k": 0}, "top_k=0"),
        (seq2seq(1), {}, "cannot be cached"),
        (masked(1), {}, "cannot be cached"),
        (tmp_path / "full", {}, "full"),
    ):
        with pytest.raises(ValueError, match=text):
            cache_teacher(model, [], tmp_path / "new", **more)
    with pytest.raises(ValueError, match="not empty"):
        cache_teacher(teacher, [], tmp_path / "full")


def test_a_path_and_an_adapter_fill_it(tmp_path: Path) -> None:
    base = causal(1, 2)
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        type(base).from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    for name, model in (("base", base), ("adapter", adapted)):
        assert cache_teacher(tmp_path / name, [batch("causal")], tmp_path / f"of {name}", dtype="float32") == 4
        assert cache_teacher(model, [batch("causal")], tmp_path / f"with {name}", dtype="float32") == 4
        one, other = (Cache(tmp_path / f"{how} {name}") for how in ("of", "with"))
        for key in one.places:
            torch.testing.assert_close(one.read(key)["values"], other.read(key)["values"])


def test_the_teachers_mode_and_weights_stay(tmp_path: Path) -> None:
    teacher = classifier(1, 2, dropout=0.5)
    teacher.train()
    before = weights(teacher)
    cache_teacher(teacher, [batch()], tmp_path / "cache")
    assert teacher.training
    assert_same(weights(teacher), before)
    assert Dataset.from_list(classified()).num_rows == 16
