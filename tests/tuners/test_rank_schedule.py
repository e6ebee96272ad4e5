"""One rank per optimizer step: in plain loops, under Trainer and SFTTrainer, with checkpointing, and after a resume."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from peft_dynamic import DyLoRAConfig
from peft_dynamic.functional.ranks import draw_rank, rank_weights
from peft_dynamic.tuners.dylora import drawn_rank, get_rank, set_rank
from tests.processes import python
from tests.tuners.common import (
    RankRecorder,
    a_layer,
    adapted,
    optimizer_of,
    rows,
    schedule_of,
    tiny_llama,
    train,
    trainable_state,
)

pytestmark = [
    # transformers about its own arguments and internals
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def expected_ranks(steps: int, seed: int = 0, ranks: tuple[int, ...] = (1, 2, 4, 8)) -> list[int]:
    weights = rank_weights(ranks, "uniform", 0.15)
    return [draw_rank(ranks, weights, seed, step) for step in range(steps)]


def test_each_optimizer_step_has_one_rank_and_all_micro_batches_share_it() -> None:
    model = adapted()
    recorder = RankRecorder(model)
    train(model, steps=20, accumulate=2)
    assert recorder.training == [rank for rank in expected_ranks(20) for _ in range(2)]
    assert set(recorder.training) == {1, 2, 4, 8}


def test_the_drawn_rank_can_be_read() -> None:
    model = adapted(rank_sampling="mostly_full")
    recorder, read = RankRecorder(model), []
    optimizer = optimizer_of(model)
    for step in range(16):
        read.append(model.drawn_rank())
        train(model, 1, optimizer, first=step)
        assert model.base_model.drawn_rank("default") == drawn_rank(model.base_model.model)
    assert read == recorder.training
    assert min(read[:8]) < 8 > min(read[8:])  # a short run trains lower ranks too
    with pytest.raises(ValueError, match="adapter_name='other' is no DyLoRA adapter"):
        model.drawn_rank("other")


def test_all_layers_use_the_same_rank() -> None:
    model = adapted()
    widths: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(
                lambda module, args, output, name=name: widths.setdefault(name, []).append(output.shape[-1])
            )
    train(model, steps=5)
    assert len(widths) == 14
    assert all(seen == expected_ranks(5) for seen in widths.values())


def test_the_seed_decides_the_ranks_and_global_generators_do_not() -> None:
    runs = []
    for seed, torch_seed in ((0, 1), (0, 2), (5, 1)):
        model = adapted(rank_seed=seed)
        recorder = RankRecorder(model)
        torch.manual_seed(torch_seed)
        train(model, steps=20)
        runs.append(recorder.training)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize(
    ("sampling", "probabilities"),
    [
        ("full", [0, 0, 0, 1]),
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("mostly_full", [1 / 12, 1 / 12, 1 / 12, 0.75]),
        ("geometric", [0.5, 0.25, 0.125, 0.0625]),
        ([0.0, 3.0, 1.0, 0.0], [0.0, 0.75, 0.25, 0.0]),
    ],
)
def test_ranks_are_drawn_with_the_asked_probabilities(sampling: Any, probabilities: list[float]) -> None:
    total = sum(probabilities)
    weights = rank_weights((1, 2, 4, 8), sampling, 0.5)
    assert weights == pytest.approx([p / total for p in probabilities])
    draws = [draw_rank((1, 2, 4, 8), weights, 0, step) for step in range(4000)]
    for rank, weight in zip((1, 2, 4, 8), weights, strict=True):
        # five standard deviations of a binomial count
        assert abs(draws.count(rank) - 4000 * weight) <= 5 * (4000 * weight * (1 - weight)) ** 0.5


def test_evaluation_and_generation_use_the_set_rank_and_sample_nothing() -> None:
    model = adapted()
    train(model, steps=3)
    model.set_rank(2)
    drawn, step = schedule_of(model).drawn, int(schedule_of(model).step)
    recorder = RankRecorder(model)
    model.eval()
    prompt = rows(2, 4)
    evaluated = model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False)
    model.train()  # a rollout in train mode, as with bitsandbytes on CPUs
    rolled_out = model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        model(input_ids=prompt)
    assert torch.equal(evaluated, rolled_out)
    assert set(recorder.training) == set(recorder.evaluation) == {2}
    assert (schedule_of(model).drawn, int(schedule_of(model).step)) == (drawn, step)
    assert model.get_rank() == 2


def test_an_evaluation_between_forward_and_backward_does_not_change_the_gradient() -> None:
    """With checkpointing the layers run again in the backward pass: still at the drawn rank."""
    gradients = []
    for disturb in (False, True):
        model = adapted()
        model.set_rank(1)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        train(model, steps=2)
        assert schedule_of(model).drawn != 1
        loss = model(input_ids=rows(4), labels=rows(4)).loss
        if disturb:
            model.eval()
            model(input_ids=rows(4))
            model.train()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_trains_the_same_as_none(reentrant: bool) -> None:
    plain, checkpointed = adapted(), adapted()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    train(plain, steps=6)
    train(checkpointed, steps=6)
    for name, value in trainable_state(plain).items():
        assert torch.allclose(trainable_state(checkpointed)[name], value, atol=1e-6)


def test_a_backbone_called_past_its_root_trains_at_the_drawn_rank() -> None:
    """Trainers that project hidden states themselves call the inner model, whose forward no hook of ours surrounds."""
    model = adapted()
    train(model, steps=1)
    recorder = RankRecorder(model)
    hidden = model.base_model.model.model(input_ids=rows(2)).last_hidden_state
    hidden.sum().backward()
    assert recorder.training == [schedule_of(model).drawn]


def test_training_after_an_evaluation_under_inference_mode() -> None:
    model = adapted()
    train(model, steps=2)
    schedule_of(model).drawn = 2
    model.set_rank(2)
    for layer in model.modules():
        for ranks in getattr(layer, "lora_views", {}).values():
            ranks.forget_basis()
    with torch.inference_mode():
        model.eval()(input_ids=rows(2))
    model.train()(input_ids=rows(2), labels=rows(2)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_error_in_the_forward_pass_leaves_the_set_rank() -> None:
    model = adapted()
    model.set_rank(2)
    train(model, steps=2)
    layer = a_layer(model)
    assert schedule_of(model).drawn != 2
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 3))
    assert (layer.r["default"], layer.lora_A["default"].weight.shape[0]) == (2, 2)


def test_a_frozen_adapter_in_train_mode_keeps_its_set_rank(tmp_path: Path) -> None:
    model = adapted()
    train(model, steps=2)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "reference", is_trainable=False)
    model.set_adapter("reference")
    for name, parameter in model.named_parameters():
        if ".reference." in name:
            parameter.requires_grad_(False)
    model.set_rank(1, adapter_name="reference")
    widths = []
    a_layer(model).lora_A["reference"].register_forward_hook(lambda m, a, output: widths.append(output.shape[-1]))
    model.train()
    model(input_ids=rows(2))
    assert widths == [1]


def test_scaling_the_adapter_holds_at_every_rank_and_in_training() -> None:
    """`set_scale` and `rescale_adapter_scale` multiply the scale; neither a rank nor a training step may lose it."""
    model = adapted(scaling="alpha/b")
    layer = a_layer(model)
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] == 0.5 * 8 / 8
    model.set_rank(2)
    assert layer.scaling["default"] == 0.5 * 8 / 2
    seen = []
    layer.lora_A["default"].register_forward_hook(lambda m, a, o: seen.append((o.shape[-1], layer.scaling["default"])))
    train(model, steps=4)
    assert seen == [(rank, 0.5 * 8 / rank) for rank in expected_ranks(4)]
    assert layer.scaling["default"] == 0.5 * 8 / 2


def training_arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(defaults | settings))


def dataset() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row.clone()} for row in rows(32)]


def test_trainer_draws_per_step_and_evaluates_at_the_set_rank(tmp_path: Path) -> None:
    model = adapted()
    model.set_rank(4)
    recorder = RankRecorder(model)
    arguments = training_arguments(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="no")
    Trainer(model, arguments, train_dataset=dataset(), eval_dataset=dataset()[:4]).train()
    assert recorder.training == [rank for rank in expected_ranks(8) for _ in range(2)]
    assert recorder.evaluation
    assert set(recorder.evaluation) == {4}


@pytest.mark.parametrize("update", ["nested", "frozen"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, update: str) -> None:
    whole = adapted(update=update)
    Trainer(whole, training_arguments(tmp_path), train_dataset=dataset()).train()
    resumed = adapted(update=update)
    recorder = RankRecorder(resumed)
    trainer = Trainer(resumed, training_arguments(tmp_path), train_dataset=dataset())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert recorder.training == [rank for rank in expected_ranks(8)[3:] for _ in range(2)]
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


def test_a_plain_loop_continues_in_a_fresh_process(tmp_path: Path) -> None:
    whole = adapted()
    train(whole, steps=6)
    half = adapted()
    optimizer = train(half, steps=3)
    half.save_pretrained(tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    code = """
import sys, torch
from pathlib import Path
from peft import LoraConfig, PeftModel, get_peft_model
import peft_dynamic
from tests.tuners.common import optimizer_of, tiny_llama, train, trainable_state
folder = Path(sys.argv[1])
model = PeftModel.from_pretrained(tiny_llama(), folder / "adapter", is_trainable=True)
optimizer = optimizer_of(model)
optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
train(model, 3, optimizer, first=3)
torch.save(trainable_state(model), folder / "result.pt")
"""
    python("-c", code, tmp_path)
    result = torch.load(tmp_path / "result.pt")
    assert all(torch.equal(value, result[name]) for name, value in trainable_state(whole).items())


def test_bf16_autocast_trains_all_ranks(tmp_path: Path) -> None:
    model = adapted()
    before = trainable_state(model)
    recorder = RankRecorder(model)
    Trainer(model, training_arguments(tmp_path, bf16=True, save_strategy="no"), train_dataset=dataset()).train()
    assert recorder.training == [rank for rank in expected_ranks(8) for _ in range(2)]
    assert all(not torch.equal(value, before[name]) for name, value in trainable_state(model).items())


def test_a_skipped_optimizer_step_is_not_counted() -> None:
    """A GradScaler skips the step on an overflow: the same rank is tried again."""
    model = adapted()
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    first = schedule_of(model).drawn
    model.train()
    loss = model(input_ids=rows(4), labels=rows(4)).loss
    scaler.scale(loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert (int(schedule_of(model).step), schedule_of(model).drawn) == (0, first)


def test_an_optimizer_that_steps_inside_backward_is_refused() -> None:
    model = adapted()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(RuntimeError, match="stepped inside backward"):
        model.train()(input_ids=rows(2), labels=rows(2)).loss.backward()


def test_an_optimizer_over_other_tensors_is_reported() -> None:
    model = adapted()
    copies = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(copies, lr=0.1)
    with pytest.warns(UserWarning, match="holds none of the DyLoRA adapter's factors"):
        train(model, steps=3, optimizer=optimizer)


def test_two_models_count_their_own_steps() -> None:
    first = adapted()
    second = copy.deepcopy(first)
    train(first, steps=3)
    assert (int(schedule_of(first).step), int(schedule_of(second).step)) == (3, 0)
    train(second, steps=1)
    assert (int(schedule_of(first).step), int(schedule_of(second).step)) == (3, 1)


@pytest.mark.parametrize("r", [8, 4])
def test_frozen_moves_only_the_components_that_the_drawn_rank_adds(r: int) -> None:
    """Under AdamW with momentum and weight decay, which move parameters whose gradient is zero."""
    ranks = [1, 2, 4, 8][: r.bit_length()]
    model = adapted(r=r, ranks=ranks, update="frozen")
    optimizer = optimizer_of(model, weight_decay=0.1)
    train(model, 2, optimizer)
    moved_at_all = 0
    for step in range(2, 14):
        rank = schedule_of(model).drawn
        below = max((other for other in ranks if other < rank), default=0)
        before = trainable_state(model)
        train(model, 1, optimizer, first=step)
        for name, value in trainable_state(model).items():
            changed = (value != before[name]).any(dim=1 if "lora_A" in name else 0)
            assert not changed[:below].any()
            assert not changed[rank:].any()
            moved_at_all += int(changed[below:rank].any())
    assert moved_at_all > 100


def test_frozen_gives_no_gradient_to_lower_components_though_they_take_part() -> None:
    frozen, nested = adapted(update="frozen"), adapted(truncation="prefix")
    for model in (frozen, nested):
        for index, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                torch.manual_seed(index)
                torch.nn.init.normal_(parameter, std=0.1)
        schedule_of(model).refresh()  # else the first forward pass would, and draw
        schedule_of(model).drawn = 4
    outputs = [model.train()(input_ids=rows(4), labels=rows(4)) for model in (frozen, nested)]
    assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-6)
    for output in outputs:
        output.loss.backward()
    for (name, a), (_, b) in zip(frozen.named_parameters(), nested.named_parameters(), strict=True):
        if a.requires_grad:
            gradient, reference = (a.grad, b.grad) if "lora_A" in name else (a.grad.mT, b.grad.mT)
            assert gradient[:2].eq(0).all()
            assert gradient[4:].eq(0).all()
            assert torch.allclose(gradient[2:4], reference[2:4], atol=1e-6)


def test_transformers_own_adapter_methods(tmp_path: Path) -> None:
    """`add_adapter`, `load_adapter` and `save_pretrained` of a transformers model, with no PeftModel around it."""
    model = tiny_llama()
    model.add_adapter(
        DyLoRAConfig(r=8, ranks=[1, 2, 4, 8], rank_sampling="uniform", target_modules="all-linear"), adapter_name="mine"
    )
    recorder_factor = a_layer(model).lora_A["mine"]
    widths: list[int] = []
    recorder_factor.register_forward_hook(lambda m, a, output: widths.append(output.shape[-1]))
    train(model, steps=4)
    assert widths == expected_ranks(4)
    model.eval()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = tiny_llama()
    loaded.load_adapter(tmp_path, adapter_name="yours")
    wrapped = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for rank in (1, 2, 4, 8):
        set_rank(model, rank)
        set_rank(loaded, rank)
        wrapped.set_rank(rank)
        assert get_rank(loaded) == rank
        expected = model(rows(2)).logits
        assert torch.equal(loaded(rows(2)).logits, expected)
        assert torch.equal(wrapped(input_ids=rows(2)).logits, expected)
    loaded.delete_adapter("yours")
    assert torch.equal(loaded(rows(2)).logits, tiny_llama().eval()(rows(2)).logits)


def test_a_checkpointed_function_of_the_users_own() -> None:
    """torch.utils.checkpoint around a part of the model, without transformers' help."""
    model = adapted()
    train(model, steps=1)
    layer = a_layer(model)
    recorder = RankRecorder(model)
    inputs = torch.randn(2, 3, 32, requires_grad=True)
    checkpoint(layer, inputs, use_reentrant=True).sum().backward()
    assert recorder.training == [schedule_of(model).drawn] * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("truncation", ["svd", "prefix"])
def test_compiled_training_compiles_once_per_rank_and_equals_eager(truncation: str) -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    eager, compiled = (adapted(truncation=truncation, ranks=[2, 8]) for _ in range(2))
    function = torch.compile(compiled, backend="eager")
    losses: dict[str, list[float]] = {}
    for name, model, call in (("eager", eager, eager), ("compiled", compiled, function)):
        optimizer = optimizer_of(model)
        for step in range(8):
            batch = rows()[2 * step : 2 * step + 2]
            loss = call.train()(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(name, []).append(loss.item())
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-5)
    assert set(expected_ranks(8, ranks=(2, 8))) == {2, 8}
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_full_trains_as_lora_does_to_the_bit() -> None:
    """Every step at r, and no warning for ranks that are cuts alone."""
    runs = []
    for config in (
        LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]),
        DyLoRAConfig(r=4, ranks=[2, 4], rank_sampling="full", lora_alpha=6, target_modules=["q_proj"]),
    ):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(5):
            ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name})
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    model.set_rank(1)
    model.set_rank(3)


def test_full_needs_components_in_order() -> None:
    with pytest.raises(ValueError, match="rank_sampling='full' trains r alone"):
        DyLoRAConfig(rank_sampling="full", truncation="prefix")
