"""The exit curve, its grid of depths and ranks, and the choice of thresholds."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_dynamic import DyLoRAConfig
from peft_dynamic.exits.adaptive import generate_adaptive
from peft_dynamic.exits.calibrate import at_level, calibrate_thresholds, cheapest, lowest
from peft_dynamic.exits.curve import ExitCurve, ExitRow, exit_curve
from peft_dynamic.exits.layers import exit_at
from tests.trainers.soft.families import DEPTH, build, cut, layers_of, tokens
from tests.trainers.soft.test_exits import state


def loss_on(ids: torch.Tensor) -> Any:
    return lambda model: {"loss": float(model(input_ids=ids, labels=ids).loss)}


def test_each_exit_is_evaluated_as_the_cut_model() -> None:
    model, ids = build("gpt2").train(), tokens(2, 9)
    before = state(model)
    modes = [module.training for module in model.modules()]
    curve = exit_curve(model, loss_on(ids), exits=[5, 2, DEPTH], progress=False)
    assert curve.exits == [2, 5, DEPTH]
    for exit in (2, 5, DEPTH):
        with torch.no_grad():
            expected = loss_on(ids)(cut(build("gpt2"), exit))["loss"]
        assert curve[exit] == {"loss": pytest.approx(expected, rel=1e-6)}
    assert state(model) == before
    assert [module.training for module in model.modules()] == modes
    assert exit_curve(build("llama"), loss_on(ids), progress=False).exits == [2, 3, 4, 5, 6]


def test_after_an_error_the_model_is_what_it_was() -> None:
    model = build("llama").train()
    before = state(model)
    with pytest.raises(TypeError, match="evaluate must return a dict"):
        exit_curve(model, lambda model: 3, progress=False)  # type: ignore[arg-type,return-value]  # on purpose
    assert state(model) == before
    assert model.training


def test_latency_grows_with_depth() -> None:
    model = build("llama")
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(model.config.num_hidden_layers))
    curve = exit_curve(
        model, lambda model: {"loss": 1.0}, exits=[1, 6], latency_tokens=4, latency_rounds=2, progress=False
    )
    assert calls[-24:] == [1, 1, 1, 1, 6, 6, 6, 6] * 3, "the exits in turn, a round to warm up first"
    assert curve.metrics == ["loss", "ms_per_token"]
    assert 0 < curve[1]["ms_per_token"] < curve[6]["ms_per_token"]
    assert curve.recommend(metric="ms_per_token", tolerance=0).exit == 1


def test_a_grid_of_depths_and_ranks(tmp_path: Path) -> None:
    """A DyLoRA adapter, trained at several depths, over both."""
    torch.manual_seed(0)
    ids = tokens(4, 9)
    model = get_peft_model(build("llama"), DyLoRAConfig(r=4, ranks=[1, 4], target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(12):
        for exit in (2, 4, DEPTH):  # the exits' losses, one after another: the plain way to train them all
            with exit_at(model, exit):
                (model(input_ids=ids, labels=ids).loss / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.set_rank(4)
    variants = {f"rank {rank}": partial(model.at_rank, rank) for rank in (1, 4)}
    curve = exit_curve(model, loss_on(ids), exits=[2, 4, DEPTH], variants=variants, progress=False)
    assert model.get_rank() == 4
    for rank in (1, 4):
        for exit in (2, 4, DEPTH):
            with torch.no_grad(), model.at_rank(rank), exit_at(model, exit):
                assert curve[exit, f"rank {rank}"] == loss_on(ids)(model.eval())
    untrained = exit_curve(build("llama"), loss_on(ids), exits=[2, 4, DEPTH], progress=False)
    for exit in (2, 4, DEPTH):
        assert curve[exit, "rank 1"]["loss"] < untrained[exit]["loss"] - 0.1
        assert curve[exit, "rank 4"]["loss"] < curve[exit, "rank 1"]["loss"]
    assert ExitCurve.from_json(curve.to_json(tmp_path / "grid.json")).rows == curve.rows
    assert ExitCurve.from_json(tmp_path / "grid.json").rows == curve.rows
    lines = curve.table().splitlines()
    assert [word for word in lines[1].replace("┃", " ").split()] == ["exit", "variant", "loss"]
    assert any("2" in line and "rank 4" in line for line in lines)
    picture = curve.plot(tmp_path / "new" / "grid.svg").read_text()
    assert "<!-- rank 1 -->" in picture
    assert "<!-- rank 4 -->" in picture
    best = curve.recommend(tolerance=0)
    assert best.metrics["loss"] == min(row.metrics["loss"] for row in curve.rows)
    with pytest.raises(KeyError, match="was not measured"):
        curve[2]


def test_the_smallest_good_exit_is_recommended() -> None:
    rows = [ExitRow(2, {"f1": 0.5}), ExitRow(4, {"f1": 0.795}), ExitRow(6, {"f1": 0.8}), ExitRow(5, {"f1": math.nan})]
    assert ExitCurve(rows).recommend(tolerance=0.01).exit == 4
    assert ExitCurve(rows).recommend(tolerance=0.001).exit == 6
    assert ExitCurve(rows).recommend(tolerance=0.4).exit == 2
    grid = ExitCurve([ExitRow(4, {"f1": 0.8}, "cheap"), ExitRow(4, {"f1": 0.8}, "dear")])
    assert grid.recommend().variant == "cheap"
    with pytest.raises(ValueError, match="the curve has no exits"):
        ExitCurve([]).recommend()
    with pytest.raises(ValueError, match="tolerance=-1"):
        ExitCurve(rows).recommend(-1)
    with pytest.raises(ValueError, match="is no exit curve"):
        ExitCurve.from_json('{"rows": [{"rank": 3, "metrics": {}}]}')


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"exits": []}, ValueError, r"exits=\[\]"),
        ({"exits": [9]}, ValueError, "exits: exit=9: the model has 6 layers"),
        ({"exits": ["2"]}, TypeError, "exits: exit='2'"),
        ({"variants": {}}, ValueError, "variants={}"),
        ({"latency_tokens": -1}, ValueError, "latency_tokens=-1"),
        ({"latency_rounds": 0}, ValueError, "latency_rounds=0"),
    ],
)
def test_bad_arguments_of_the_curve(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        exit_curve(build("llama"), loss_on(tokens(1, 3)), progress=False, **arguments)


def test_the_lowest_threshold_at_which_enough_agree() -> None:
    p = torch.tensor([0.2, 0.9, 0.6, 0.8, 0.4])
    hit = torch.tensor([False, True, True, False, True])
    # Falling: .9 yes 1/1, .8 no 1/2, .6 yes 2/3, .4 yes 3/4, .2 no 3/5
    assert lowest(p, hit, 1.0) == pytest.approx(0.85)
    assert lowest(p, hit, 0.75) == pytest.approx(0.3)
    assert lowest(p, hit, 0.7) == pytest.approx(0.3)
    assert lowest(p, hit, 0.6) == pytest.approx(0.2)
    assert lowest(p, ~hit, 1.0) is None
    ties = torch.tensor([0.5, 0.5, 0.3])
    assert lowest(ties, torch.tensor([True, False, False]), 0.9) is None, "equals leave together"
    assert lowest(ties, torch.tensor([True, False, False]), 0.5) == pytest.approx(0.4)


def test_costs_and_agreements_by_hand() -> None:
    sure = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.9, 0.9, 0.9, 0.1]])
    right = torch.tensor([[True, False, False, True], [True, True, False, True]])
    one = at_level(sure, right, [0], [2, 4], 6, 1.0, 1.0)
    assert one.thresholds == {2: pytest.approx(0.85)}
    # One token leaves after 2 layers and a head; three run 6 layers and two heads. A whole token is 7.
    assert (one.agreement, one.mean_exit) == (1.0, (2 + 3 * 6) / 4)
    assert one.cost == pytest.approx((2 + 1 + 3 * (6 + 2)) / 4 / 7)
    both = at_level(sure, right, [0, 1], [2, 4], 6, 0.5, 1.0)
    # Level 0.5: falling .9 yes, .8 no, .2 yes, .1 no: all four leave after 2
    assert (both.agreement, both.mean_exit) == (0.5, 2.0)
    assert both.cost == pytest.approx(3 / 7)
    assert cheapest(sure, right, [2, 4], 6, 0.5, 1.0).mean_exit == 2.0
    free = cheapest(sure, right, [2, 4], 6, 1.0, 0.0)
    # With exit 4 alone .9 is right two times of three, so nobody may leave there but with what 2 leaves over: 1 of 2
    assert free.thresholds == {2: pytest.approx(0.85)}
    dear = cheapest(sure, right, [2, 4], 6, 1.0, 100.0)
    assert (dear.thresholds, dear.cost, dear.agreement) == ({}, 1.0, 1.0), "no exit pays"


def test_calibrated_thresholds_keep_what_they_promise() -> None:
    model = build("gpt2")  # learned positions: padding must not shift them
    with torch.no_grad():  # later layers change little
        for layer in list(layers_of(model))[2:]:
            for parameter in layer.parameters():
                parameter.mul_(0.5 if parameter.dim() > 1 else 1)
    ids = tokens(16, 20)
    mask = torch.ones_like(ids)
    mask[:4, :6] = 0
    labels = torch.where((torch.arange(20) >= 10) & (mask > 0), ids, -100)
    batches = [{"input_ids": ids[i : i + 4], "attention_mask": mask[i : i + 4]} for i in range(0, 16, 4)]
    before = state(model)
    found = calibrate_thresholds(model, batches, exits=[1, 2, 4], agreement=0.9, head_cost=0.1)
    assert state(model) == before
    assert found.tokens == 16 * 19 - 4 * 6
    assert found.thresholds
    assert 0.9 <= found.agreement < 1
    assert found.cost < 1

    # The same by the plain rule, from cut models
    agreed = total = layers = 0
    models = {exit: cut(build_like(model), exit) for exit in (1, 2, 4, DEPTH)}
    for batch in batches:
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = {exit: each(**batch, position_ids=positions).logits for exit, each in models.items()}
        for row, at in (batch["attention_mask"][:, :-1] * batch["attention_mask"][:, 1:]).nonzero().tolist():
            for exit, values in logits.items():
                if exit == DEPTH or values[row, at].softmax(-1).max() >= found.thresholds.get(exit, 2):
                    break
            agreed += int(values[row, at].argmax() == logits[DEPTH][row, at].argmax())
            layers += exit
            total += 1
    assert total == found.tokens
    assert agreed / total == pytest.approx(found.agreement)
    assert layers / total == pytest.approx(found.mean_exit)
    labelled = calibrate_thresholds(
        model, [{"input_ids": ids, "attention_mask": mask, "labels": labels}], exits=[2], agreement=0.9
    )
    assert labelled.tokens == 16 * 10
    generate_adaptive(model, ids, mask, thresholds=found.thresholds, max_new_tokens=3)


def build_like(model: Any) -> Any:
    other = build("gpt2")
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"agreement": 0}, ValueError, "agreement=0"),
        ({"agreement": 98}, ValueError, "agreement=98"),
        ({"exits": [6]}, ValueError, r"exits=\[6\]: name at least one layer below the last"),
        ({"exits": [0]}, ValueError, "exits: exit=0"),
        ({"exits": 4}, TypeError, "exits=4: must be a list"),
        ({"head_cost": -1}, ValueError, "head_cost=-1"),
        ({"batches": []}, ValueError, "batches: there is no token"),
        ({"batches": [tokens(1, 3)]}, TypeError, "batches: each must be a dict"),
    ],
)
def test_bad_arguments_of_the_calibration(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibrate_thresholds(build("llama"), **{"batches": [{"input_ids": tokens(1, 3)}], **arguments})
