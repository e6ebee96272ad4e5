"""cut_activations and calibrate_cut: what is 0, what learns, and who sees it."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from peft_dynamic import (
    ActivationDensityLoss,
    calibrate_cut,
    cut_activations,
    measure_density,
    sparse_inference,
)
from peft_dynamic.functional.density import SizeCounts
from tests.density.models import FAMILIES, batch_for, build, with_lora

CUT = 0.1


def test_values_and_gradients_by_hand() -> None:
    model, x = nn.Sequential(nn.GELU()), torch.tensor([[-1.0, 0.1, 0.5, 3.0]], requires_grad=True)
    with cut_activations(model, 0.2, "0"):
        y = model(x)
    full = gelu(x)
    assert (full.abs() > 0.2).tolist() == [[False, False, True, True]]  # -0.159, 0.054, 0.346, 2.996
    assert torch.equal(y[:, 2:], full[:, 2:])
    assert y[:, :2].eq(0).all()
    (slope,) = torch.autograd.grad(y.sum(), x)
    (plain,) = torch.autograd.grad(full.sum(), x)
    assert torch.equal(slope, plain * (full.abs() > 0.2))
    assert torch.equal(model(x), full)  # it ended with the block


@pytest.mark.parametrize("family", ["Bert", "T5 gated", "Llama", "GPT2", "Albert"])
@pytest.mark.parametrize("first", ["cut", "loss"])
def test_the_loss_and_the_measurement_see_what_is_left(family: str, first: str) -> None:
    model = with_lora(family)
    batch = batch_for(family)
    density = ActivationDensityLoss(0.0, eps=1e-12)  # so narrow that it counts what is not 0
    if first == "loss":
        density.attach(model)
    size = measure_density(model, [batch], threshold=CUT).rows[0]
    assert size.exact > 0.9 > size.above
    cut = cut_activations(model, CUT)
    if first == "cut":
        density.attach(model)
    assert len(cut.layers) == FAMILIES[family][3]
    report = measure_density(model, [batch], threshold=CUT)
    assert all(row.exact == row.above < 0.9 for row in report.rows)
    assert report.rows[0].exact == size.above  # the first layer: its input is not changed by cutting
    cut.detach()
    assert measure_density(model, [batch], threshold=CUT).rows[0] == size


def test_the_loss_presses_on_what_is_left_only() -> None:
    torch.manual_seed(0)
    model = with_lora("Bert")
    batch = batch_for("Bert")
    terms = []
    for threshold in (None, CUT):
        held = copy.deepcopy(model)
        density = ActivationDensityLoss(1.0, eps=1e-12, add_to_loss=False).attach(held)
        cut = cut_activations(held, threshold) if threshold else None
        out = held(**batch)  # the term lives with it
        terms.append((density.penalty().item(), measure_density(held, [batch]).mean()))
        assert out.loss.requires_grad
        assert (cut is None) == (threshold is None)
    for term, exact in terms:
        assert term == pytest.approx(exact, abs=0.01)
    assert terms[1][0] < 0.9 * terms[0][0]


def test_sparse_inference_with_the_threshold_is_the_same_function() -> None:
    torch.manual_seed(0)
    model = build("Llama").eval()
    prompt = torch.randint(3, 64, (1, 7))
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        plain = model(prompt).logits
        with cut_activations(model, 0.004):
            cut = model(prompt).logits
            text = model.generate(prompt, **arguments)
        with sparse_inference(model, threshold=0.004, max_density=1.0) as sparse:
            assert torch.equal(model(prompt).logits, cut)
            assert torch.equal(model.generate(prompt, **arguments), text)
            assert sum(layer.sparse_tokens for layer in sparse.layers) > 0
        assert not torch.equal(plain, cut)
        assert torch.equal(model(prompt).logits, plain)


def test_training_makes_up_for_the_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(256, 8)

    def train(steps: int) -> float:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(steps):
            loss = (model(x) - x).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return (model(x) - x).pow(2).mean().item()

    before = train(300)
    with cut_activations(model, 0.2, "1"):
        with torch.no_grad():
            at_once = (model(x) - x).pow(2).mean().item()
        after = train(300)
        active = measure_density(model, [x], activation_modules="1").mean()
    assert at_once > 3 * before
    assert after < at_once / 2
    assert active < 0.6


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), True, "0.2", None])
def test_a_threshold_without_a_meaning_is_refused(threshold: Any) -> None:
    with pytest.raises(ValueError, match="threshold must be a positive number"):
        cut_activations(build("Bert"), threshold)


def test_a_second_cut_is_refused_and_leaves_the_first() -> None:
    model = build("Bert")
    batch = batch_for("Bert")
    with cut_activations(model, 0.01):
        before = measure_density(model, [batch]).mean()
        with pytest.raises(ValueError, match="cut already"):
            cut_activations(model, 0.1)
        assert measure_density(model, [batch]).mean() == before
    with pytest.raises(ValueError, match="matches no module"):
        cut_activations(model, 0.1, "nowhere")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
def test_the_threshold_is_the_quantile_of_all_batches(dtype: torch.dtype, density: float) -> None:
    torch.manual_seed(0)
    a = (torch.randn(6, 50, 40) * torch.rand(40).exp()).to(dtype)
    counts = SizeCounts()
    for part in a.split(2):
        counts.add(part)
    found, sizes = counts.threshold(density), a.double().abs().flatten().sort().values
    assert (sizes > found).double().mean() <= density
    allowed = int(density * len(sizes))  # so many may stay; the smallest threshold is the next size below them
    exact = sizes[len(sizes) - allowed - 1].item()
    assert exact <= found <= exact * (1 + 1 / 1024)


def test_sizes_zeros_masks_and_what_is_not_finite() -> None:
    counts = SizeCounts()
    counts.add(torch.tensor([[[0.0, 1.0], [-2.0, 9.0]]]), torch.tensor([[1, 0]]))  # the second token is padding
    counts.add(torch.tensor([0.0, -0.0]))
    assert counts.threshold(0.25) == 0.0  # of four one is not 0
    assert 1 <= counts.threshold(0.24) < 1.001
    counts.add(torch.tensor([float("nan"), float("inf")]))
    assert 1 <= counts.threshold(0.34) < 1.001  # two of six may stay
    with pytest.raises(ValueError, match="infinite or NaN"):
        counts.threshold(0.3)


@pytest.mark.parametrize("family", ["Bert", "T5 gated", "Llama", "GPT2", "ViT"])
def test_each_layer_keeps_the_share_that_was_asked_for(family: str) -> None:
    model, batch = with_lora(family), batch_for(family)
    thresholds = calibrate_cut(model, [batch, batch], density=0.3)
    plain = measure_density(model, [batch])
    assert list(thresholds) == [row.layer for row in plain.rows]
    for row in plain.rows:
        size = measure_density(model, [batch], threshold=thresholds[row.layer])
        (above,) = (other.above for other in size.rows if other.layer == row.layer)
        assert 0.29 < above <= 0.3 < row.exact
    with cut_activations(model, json.loads(json.dumps(thresholds))) as cut:
        rows = measure_density(model, [batch]).rows
        assert 0.29 < rows[0].exact <= 0.3  # the layers after it see other inputs now
        assert all(0.15 < row.exact < 0.45 for row in rows)
        assert cut.layers == list(thresholds)
        cut.thresholds[cut.layers[0]] = 0.0
        assert measure_density(model, [batch]).rows[0] == plain.rows[0]


def test_one_stack_alone_and_padding() -> None:
    model, batch = with_lora("T5 gated"), batch_for("T5 gated")
    thresholds = calibrate_cut(model, [batch], 0.2, r"decoder\..*act")
    assert len(thresholds) == 2
    assert all(name.startswith("decoder.") for name in thresholds)
    before = measure_density(model, [batch])
    with cut_activations(model, thresholds):
        after = measure_density(model, [batch])
    assert after.mean("encoder") == before.mean("encoder") > 0.9
    assert after.mean("decoder") < 0.3
    padded = calibrate_cut(model, [batch], 0.2, r"decoder\..*act", include_padding=True)
    assert padded != thresholds


def test_sparse_inference_takes_the_dict_and_leaves_other_blocks_alone() -> None:
    torch.manual_seed(0)
    model = build("Llama").eval()
    prompt = torch.randint(3, 64, (1, 7))
    thresholds = calibrate_cut(model, [prompt], density=0.3)
    second = dict([list(thresholds.items())[1]])
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    for chosen in (thresholds, second):
        with torch.no_grad(), cut_activations(model, chosen):
            cut, text = model(prompt).logits, model.generate(prompt, **arguments)
        with torch.no_grad(), sparse_inference(model, chosen, max_density=1.0) as sparse:
            assert torch.equal(model(prompt).logits, cut)
            assert torch.equal(model.generate(prompt, **arguments), text)
            assert [layer.name for layer in sparse.layers] == list(chosen)
            assert all(layer.sparse_tokens > 0 for layer in sparse.layers)


def test_a_dict_has_whole_names() -> None:
    model = nn.Sequential()
    model.add_module("act", nn.GELU())
    model.add_module("inner", nn.Sequential(nn.Linear(4, 4)))
    model.inner.add_module("act", nn.GELU())
    with cut_activations(model, {"act": 0.2}) as cut:  # not inner.act, as a pattern would
        assert cut.layers == ["act"]
        assert model.inner(torch.randn(9, 4)).ne(0).all()
        assert model.act(torch.full((3,), 0.1)).eq(0).all()


@pytest.mark.parametrize("density", [0, 1, -0.5, 40, float("nan"), True, "0.4", None])
def test_a_share_without_a_meaning_is_refused(density: Any) -> None:
    with pytest.raises(ValueError, match="density must be a number above 0 and below 1"):
        calibrate_cut(build("Bert"), [batch_for("Bert")], density)


def test_thresholds_that_do_not_fit_are_refused_before_anything_is_cut() -> None:
    model, batch = build("Llama"), batch_for("Llama")
    thresholds = calibrate_cut(model, [batch], 0.5)
    first = next(iter(thresholds))
    before = measure_density(model, [batch])
    for entry in (cut_activations, sparse_inference):
        model.eval()
        for wrong in ({}, {first: -1.0}, {first: float("inf")}, {first: True}, {first: None}):
            with pytest.raises(ValueError, match="threshold must map names of activations to numbers of at least 0"):
                entry(model, wrong)
        with pytest.raises(ValueError, match=r"does not have: \['layers.7"):
            entry(model, thresholds | {"layers.7.mlp.act_fn": 0.1})
        with pytest.raises(ValueError, match="Leave activation_modules out"):
            entry(model, thresholds, activation_modules="act_fn")
    with pytest.raises(ValueError, match="no activation was counted"):
        calibrate_cut(model, [], 0.5)
    assert measure_density(model, [batch]) == before
