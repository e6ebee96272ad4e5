"""The gradients of the density loss against the loss written out by hand, in bare loops."""

import copy
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_dynamic.density import ActivationDensityLoss
from tests.density.models import (
    EPS,
    FAMILIES,
    WEIGHT,
    assert_same,
    attached,
    batch_for,
    build,
    density_by_hand,
    gradients,
    reference,
    task,
    with_lora,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_found_and_has_the_gradients_of_the_hand_written_loss(family: str) -> None:
    model, batch = with_lora(family), batch_for(family)
    wanted = reference(model, family, batch)
    density = attached(model)
    ending, number = FAMILIES[family][2:]
    assert len(density.layers) == number
    assert all(name.endswith(f".{ending}") for name in density.layers)
    for _ in range(2):  # the second knows what autograd keeps
        model(**batch).loss.backward()
        assert_same(gradients(model), wanted)


def test_the_density_is_not_a_small_part_of_the_gradients() -> None:
    """Without it the comparison above would say nothing."""
    model, batch = with_lora("Llama"), batch_for("Llama")
    wanted = reference(model, "Llama", batch)
    model(**batch).loss.backward()
    with pytest.raises(AssertionError):
        assert_same(gradients(model), wanted, rtol=0.5)


@pytest.mark.parametrize("surrogate", ["tanh", "hinge"])
def test_other_surrogates(surrogate: str) -> None:
    model, batch = with_lora("Bert"), batch_for("Bert")
    kept: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, output: kept.append(output))
        for name, module in model.named_modules()
        if name.endswith("intermediate_act_fn")
    ]
    loss = model(**batch).loss
    real = batch["attention_mask"].bool()
    width = EPS**0.5
    for a in kept:
        smooth = torch.tanh(a.abs() / width) if surrogate == "tanh" else (a.abs() / width).clamp(max=1.0)
        loss = loss + WEIGHT * sum(smooth[row][real[row]].mean() for row in range(4)) / 4 / 2
    for handle in handles:
        handle.remove()
    loss.backward()
    wanted = gradients(model)
    attached(model, surrogate=surrogate)
    model(**batch).loss.backward()
    assert_same(gradients(model), wanted)


def test_padding_does_not_count_unless_it_is_asked_for() -> None:
    model, batch = with_lora("Llama"), batch_for("Llama")
    density = attached(model)
    model(**batch)
    masked = density.value
    longer = {
        key: torch.nn.functional.pad(value, (0, 5), value=-100 if key == "labels" else 0)
        for key, value in batch.items()
    }
    model(**longer)
    assert density.value == pytest.approx(float(masked), rel=1e-5)
    density.detach()
    everything = attached(model, include_padding=True)
    model(**batch)
    with_nine = float(everything.value)
    no_mask = {key: value for key, value in batch.items() if key != "attention_mask"}
    assert with_nine != pytest.approx(float(masked), rel=1e-3)
    _, wanted = density_by_hand(model, "Llama", no_mask, lambda: model(**batch))
    assert with_nine == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_a_decoder_mask_of_its_own_wins_over_the_labels() -> None:
    model, batch = build("Bart"), batch_for("Bart")
    density = attached(model)
    model(**batch)
    by_labels = float(density.value)
    batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
    model(**batch)
    assert float(density.value) == pytest.approx(by_labels, rel=1e-5)
    batch["decoder_attention_mask"][:, 4:] = 0
    model(**batch)
    assert float(density.value) != pytest.approx(by_labels, rel=1e-3)
    # and decoder_input_ids say it where there are no labels: the start token counts, padding does not
    ids = torch.tensor([[0, 5, 6, 1, 1, 1]] * 4)  # 1 is BART's padding
    density.detach()
    density = attached(model, add_to_loss=False)
    no_labels = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    model(**no_labels, decoder_input_ids=ids)
    three = float(density.value)
    model(**no_labels, decoder_input_ids=ids, decoder_attention_mask=(ids != 1).long())
    assert float(density.value) == pytest.approx(three, rel=1e-5)


def test_the_mask_may_be_given_by_position() -> None:
    model, batch = with_lora("Bert"), batch_for("Bert")
    density = attached(model)
    model(**batch)
    by_name = density.value
    model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    assert torch.equal(density.value, by_name)


def test_layer_weights_as_a_list_and_by_name() -> None:
    model, batch = with_lora("Bert"), batch_for("Bert")
    values = []
    for given in ([1.0, 0.0], [0.0, 1.0], [0.25, 2.0], {"layer.0": 0.25, "layer.1": 2.0}, {"layer.1": 0}):
        density = attached(model, layer_weights=given)
        model(**batch)
        values.append(float(density.value))
        density.detach()
    first, second, both, named, last_off = values
    assert both == pytest.approx(0.25 * first + 2 * second)
    assert named == pytest.approx(both)
    assert last_off == pytest.approx(first)


# --- loops


def test_a_loss_of_your_own_takes_the_penalty_and_is_stopped_without_it() -> None:
    model, batch = with_lora("Bert"), batch_for("Bert")
    wanted = reference(model, "Bert", batch)
    density = attached(model)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    cross_entropy = nn.functional.cross_entropy
    with pytest.raises(RuntimeError, match=r"penalty\(\)"):
        cross_entropy(model(**inputs).logits, batch["labels"]).backward()
    assert not gradients(model)
    loss = cross_entropy(model(**inputs).logits, batch["labels"])
    (loss + density.penalty()).backward()
    assert_same(gradients(model), wanted)
    with pytest.raises(RuntimeError, match="needs a training pass"):
        density.penalty()


def test_a_loss_from_the_logits_beside_outputs_loss() -> None:
    model, batch = with_lora("Bert"), batch_for("Bert")
    output, by_hand = density_by_hand(model, "Bert", batch, lambda: model(**batch))
    (output.loss + WEIGHT * by_hand + output.logits.pow(2).mean()).backward()
    wanted = gradients(model)
    attached(model)
    output = model(**batch)
    (output.loss + output.logits.pow(2).mean()).backward()
    assert_same(gradients(model), wanted)
    with pytest.raises(RuntimeError, match="add_to_loss=False"):
        model(**batch).logits.pow(2).mean().backward()


def test_tuples_work_like_outputs() -> None:
    model, batch = with_lora("Bert"), batch_for("Bert")
    wanted = reference(model, "Bert", batch)
    attached(model)
    model(**batch, return_dict=False)[0].backward()
    assert_same(gradients(model), wanted)


def test_accumulation_is_the_whole_batch_whatever_the_lengths() -> None:
    model, batch = with_lora("Bert"), batch_for("Bert", size=8)
    wanted = reference(model, "Bert", batch)
    attached(model)
    for part in range(4):
        rows = slice(2 * part, 2 * part + 2)
        (model(**{key: value[rows] for key, value in batch.items()}).loss / 4).backward()
    assert_same(gradients(model), wanted)


def test_loss_scaling_and_autocast() -> None:
    model, batch = with_lora("Bert"), batch_for("Bert")
    wanted = reference(model, "Bert", batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, by_hand = density_by_hand(model, "Bert", batch, lambda: model(**batch))
        (output.loss + WEIGHT * by_hand).backward()
        half = gradients(model)
    attached(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(**batch).loss).backward()
    assert_same({name: value / 1024 for name, value in gradients(model).items()}, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    found = gradients(model)
    cosine = nn.functional.cosine_similarity
    flat = [torch.cat([value.flatten() for value in each.values()]) for each in (found, half)]
    assert cosine(*flat, dim=0) > 0.995
    assert flat[0].norm() == pytest.approx(float(flat[1].norm()), rel=0.05)


@pytest.mark.parametrize("family", ["Llama", "OPT", "T5 gated"])
def test_checkpointing_changes_no_gradient_and_reentrant_is_refused(family: str) -> None:
    model, batch = with_lora(family), batch_for(family)
    wanted = reference(model, family, batch)
    other = reference(model, family, part_of(batch, slice(0, 2)))
    density = attached(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    assert_same(gradients(model), wanted)
    # two passes, and then two backward passes: each recomputation belongs to its own mask
    first, second = model(**batch).loss, model(**part_of(batch, slice(0, 2))).loss
    first.backward()
    assert_same(gradients(model), wanted)
    second.backward()
    assert_same(gradients(model), other)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(**batch)
    density.detach()


def part_of(batch: dict, rows: slice) -> dict:
    return {key: value[rows] for key, value in batch.items()}


def test_a_penalty_of_several_passes_counts_their_samples() -> None:
    """Three samples and one: the mean over four, not over two passes; and the gradient is that of the sum."""
    model, batch = with_lora("Llama"), batch_for("Llama")
    density, values, outputs = attached(model, add_to_loss=False), [], []
    for rows in (slice(0, 3), slice(3, 4)):
        outputs.append(model(**part_of(batch, rows)))  # a pass whose outputs are dropped takes its term along
        assert density.value is not None
        values.append(float(density.value))
    assert abs(values[0] - values[1]) > 1e-3
    penalty = density.penalty()
    torch.testing.assert_close(float(penalty.detach()), WEIGHT * (3 * values[0] + values[1]) / 4, rtol=1e-5, atol=0)
    penalty.backward()
    assert any(gradient.abs().sum() > 0 for gradient in gradients(model).values())


# --- when it does nothing


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weight_zero_is_bitwise_nothing_but_is_measured(checkpointing: bool) -> None:
    model, batch = with_lora("Llama"), batch_for("Llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = model(**batch).loss
    plain.backward()
    wanted = gradients(model)
    density = attached(model, weight=0.0)
    loss = model(**batch).loss
    loss.backward()
    found = gradients(model)
    assert torch.equal(loss, plain)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert 0 < float(density.value) < 1


def test_it_is_absent_in_eval_and_without_gradients() -> None:
    model, batch = with_lora("Llama"), batch_for("Llama")
    plain = model(**batch).loss
    density = attached(model)
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, plain)
    model.eval()
    assert torch.equal(model(**batch).loss, plain)
    assert density.value is None
    model.train()
    assert model(**batch).loss > plain + 0.01
    density.detach()
    assert torch.equal(model(**batch).loss, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_activation_is_kept_longer_than_its_graph() -> None:
    model, batch = with_lora("Llama"), batch_for("Llama")
    density = attached(model)
    kept: list[Any] = []
    handle = model.base_model.model.model.layers[0].mlp.act_fn.register_forward_hook(
        lambda _, __, output: kept.append(weakref.ref(output))
    )
    loss = model(**batch).loss
    loss.backward()
    del loss
    handle.remove()
    assert [ref() for ref in kept] == [None]
    assert not density.value.requires_grad


def test_an_error_in_the_forward_pass_leaves_it_usable() -> None:
    model, batch = with_lora("Llama"), batch_for("Llama")
    wanted = reference(model, "Llama", batch)
    attached(model)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.tensor([[10**6]]))
    model(**batch).loss.backward()
    assert_same(gradients(model), wanted)


def test_a_copied_model_has_a_loss_of_its_own() -> None:
    model, batch = with_lora("Llama"), batch_for("Llama")
    wanted = reference(model, "Llama", batch)
    density = attached(model)
    other = copy.deepcopy(model)
    density.detach()
    plain = model(**batch).loss
    loss = other(**batch).loss
    assert loss > plain + 0.01
    loss.backward()
    assert_same(gradients(other), wanted)


# --- what is kept, and what is made again


@pytest.mark.parametrize("trained", ["all", "LoRA on the attention", "LoRA everywhere"])
@pytest.mark.parametrize("family", ["Bert", "OPT", "Llama"])
def test_autograd_keeps_no_further_tensor(family: str, trained: str) -> None:
    model, batch = build(family), batch_for(family)
    if trained != "all":
        attention = ["query"] if family == "Bert" else ["q_proj"]
        targets: Any = attention if trained.endswith("attention") else "all-linear"
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type=task(family)))

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() > 1:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch).loss  # noqa: F841  # holds the graph
        return sum(sizes.values())

    without = kept()
    attached(model)
    assert [kept() for _ in range(3)] == [without] * 3


@pytest.mark.parametrize("targets", [["query"], "all-linear"], ids=["attention", "all-linear"])
def test_an_activation_that_autograd_keeps_is_not_made_again(targets: Any) -> None:
    model = get_peft_model(build("Bert"), LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS"))
    attached(model)
    calls = []
    for layer in model.get_base_model().bert.encoder.layer:
        module = layer.intermediate.intermediate_act_fn
        module.forward = lambda x, make=module.forward: calls.append(1) or make(x)
    for _ in range(3):
        model(**batch_for("Bert")).loss.backward()
    again = 2 * 3 if targets == ["query"] else 2  # two layers; in the first pass it is not known yet
    assert len(calls) == 2 * 3 + again


def test_an_activation_that_others_hold_is_right_under_checkpointing() -> None:
    """The pass that sees that it is held, and the recomputation that begins after it, keep different tensors."""
    model, batch = with_lora("Bert"), batch_for("Bert")
    wanted = reference(model, "Bert", batch)
    attached(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    held: list[torch.Tensor] = []
    for layer in model.get_base_model().bert.encoder.layer:
        layer.intermediate.intermediate_act_fn.register_forward_hook(lambda _, __, a: held.append(a))
    for _ in range(2):
        model(**batch).loss.backward()
        assert_same(gradients(model), wanted)


def test_an_activation_that_is_changed_in_place_is_made_again() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.act(self.up(x)).mul_(3.0))

    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 4)
    a = net.act(net.up(x))
    wanted = torch.autograd.grad((a**2 / (a**2 + EPS)).mean(), net.up.weight)[0]
    density = ActivationDensityLoss(1.0, EPS, activation_modules="act").attach(net)
    for _ in range(2):
        output = net(x)
        total = density.penalty() + 0 * output.sum()
        torch.testing.assert_close(torch.autograd.grad(total, net.up.weight)[0], wanted)


def test_passes_without_a_backward_pass_are_let_go() -> None:
    model, batch = with_lora("Bert"), batch_for("Bert")
    density = attached(model)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    for _ in range(3):
        model(**inputs)
    with pytest.raises(RuntimeError, match="needs a training pass"):
        density.penalty()
