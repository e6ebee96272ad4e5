"""The rank curve: what it measures, what it leaves as it was, and what it recommends."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_dynamic import AdapterMoments, DyLoRAConfig, at_rank, budget_ranks, get_rank, resize_adapter
from peft_dynamic.ranks import RankCurve, RankRow, rank_curve
from tests.processes import python
from tests.stock_cases import build


def adapted(**settings: object) -> tuple[nn.Module, torch.Tensor]:
    base, inputs = build("linear")
    config = {"r": 4, "lora_alpha": 8, "ranks": [1, 2, 4], "target_modules": ["a", "b"]} | settings
    model = get_peft_model(base, DyLoRAConfig(**config))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    return model, inputs


def curve(base: float | None = None, **values: dict[int, float]) -> RankCurve:
    """A curve with one metric per keyword, rank -> value."""
    ranks = sorted({rank for points in values.values() for rank in points})
    rows = [RankRow(rank, {name: points[rank] for name, points in values.items()}) for rank in ranks]
    return RankCurve([RankRow(None, dict.fromkeys(values, base)), *rows] if base is not None else rows)


def test_each_row_is_the_model_at_that_rank_and_the_base_without_it() -> None:
    model, inputs = adapted()
    result = rank_curve(model, lambda m: {"total": m(inputs).sum().item()}, progress=False)
    model.eval()
    assert [row.rank for row in result.rows] == [None, 1, 2, 4]
    assert result.ranks == [1, 2, 4]
    assert result[None]["total"] == build("linear")[0](inputs).sum().item()
    for rank in (1, 2, 4):
        with model.at_rank(rank):
            assert result[rank]["total"] == model(inputs).sum().item()
    assert len({row.metrics["total"] for row in result.rows}) == 4


def test_modes_rank_gradients_and_adapters_are_put_back() -> None:
    model, _ = adapted()
    model.set_rank(2)
    model.train()
    model.base_model.model.emb.eval()
    before = [(module, module.training) for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    seen = []

    def evaluate(m: nn.Module) -> dict:
        seen.append((m.training, torch.is_grad_enabled(), m.get_rank()))
        return {"loss": 1.0}

    rank_curve(model, evaluate, ranks=[4, 1], progress=False)
    assert seen == [(False, False, 1), (False, False, 4), (False, False, 2)]
    assert [(module, module.training) for module in model.modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert model.get_rank() == 2


@pytest.mark.parametrize("fails_at", [1, 3])
def test_an_error_in_evaluate_leaves_the_model_as_it_was(fails_at: int) -> None:
    model, inputs = adapted()
    expected = model.eval()(inputs)
    model.train()
    calls = iter(range(10))

    def evaluate(m: nn.Module) -> dict:
        if next(calls) == fails_at:
            raise RuntimeError("out of memory")
        return {"loss": 1.0}

    with pytest.raises(RuntimeError, match="out of memory"):
        rank_curve(model, evaluate, progress=False)
    assert model.training
    assert model.get_rank() == 4
    assert torch.equal(model.eval()(inputs), expected)


def test_a_frozen_adapter_stays_frozen() -> None:
    model, inputs = adapted()
    model.requires_grad_(False)
    rank_curve(model, lambda m: {"x": m(inputs).sum()}, progress=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_transformers_model_with_an_added_adapter() -> None:
    model, inputs = build("llama")
    plain = model(inputs).logits.sum().item()
    config = DyLoRAConfig(r=4, ranks=[1, 4], target_modules="all-linear", modules_to_save=["lm_head"])
    model.add_adapter(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    result = rank_curve(model, lambda m: {"total": m(inputs).logits.sum().item()}, progress=False)
    assert result[None]["total"] == plain
    assert result[4]["total"] == model.eval()(inputs).logits.sum().item()  # modules_to_save is in use again too


def test_trained_biases_leave_no_base_row() -> None:
    model, _ = adapted(bias="lora_only")
    with pytest.warns(UserWarning, match="cannot be switched off"):
        result = rank_curve(model, lambda m: {"loss": 1.0}, progress=False)
    assert [row.rank for row in result.rows] == [1, 2, 4]


def test_disabled_adapters_are_refused() -> None:
    model, _ = adapted()
    with model.disable_adapter(), pytest.raises(ValueError, match="every rank would be the base model"):
        rank_curve(model, lambda m: {"loss": 1.0}, progress=False)


@pytest.mark.parametrize(
    "returned", [None, 3.0, {"loss": "low"}, {"loss": [1]}, {"loss": ["low", 2]}, {"loss": torch.ones(2, 2)}, {}]
)
def test_what_is_no_dict_of_numbers_is_refused(returned: object) -> None:
    with pytest.raises(TypeError, match="evaluate"):
        rank_curve(adapted()[0], lambda m: returned, progress=False)


@pytest.mark.parametrize("ranks", [[], [0], [1, 5]])
def test_bad_ranks_are_refused_before_anything_is_evaluated(ranks: list) -> None:
    with pytest.raises(ValueError, match="rank"):
        rank_curve(adapted()[0], lambda m: pytest.fail("evaluated"), ranks=ranks, progress=False)


@pytest.mark.parametrize(
    "given", [{"ranks": 4}, {"ranks": "12"}, {"ranks": [1, "2"]}, {"budgets": 0.5}, {"budgets": [0.5, "x"]}]
)
def test_what_is_no_list_of_ranks_or_budgets_names_itself(given: dict[str, Any]) -> None:
    name = next(iter(given))
    with pytest.raises(TypeError, match=rf"^{name}=.*: must be a list of "):
        rank_curve(stock()[0], lambda m: pytest.fail("evaluated"), progress=False, **given)


def test_the_progress_bar_counts_the_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    rank_curve(adapted()[0], lambda m: {"loss": 1.0})
    assert "4/4" in capsys.readouterr().err
    rank_curve(adapted()[0], lambda m: {"loss": 1.0}, progress=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("tolerance", "rank"),
    [(0, 4), (0.004, 4), (0.006, 2), (0.0999, 2), (0.11, 1)],  # 2.01 is 0.5 % and 2.2 is 10 % above the best, 2.0
)
def test_recommend_takes_the_smallest_rank_within_tolerance(tolerance: float, rank: int) -> None:
    losses = curve(loss={1: 2.2, 2: 2.01, 4: 2.0, 8: 2.005})
    assert losses.recommend(tolerance) == rank


@pytest.mark.parametrize(
    ("tolerance", "rank"),
    [(0, 4), (0.04, 4), (0.06, 4), (0.11, 2), (0.99, 2), (1, 1)],  # of a gain of .1 rank 2 lost .01 and rank 8 .005
)
def test_recommend_goes_by_the_gain_over_the_base_model(tolerance: float, rank: int) -> None:
    losses = curve(base=9.1, loss={1: 9.1, 2: 9.01, 4: 9.0, 8: 9.005})
    assert losses.recommend(tolerance) == rank
    assert losses.gains() == pytest.approx({1: 0.0, 2: 0.09, 4: 0.1, 8: 0.095})
    upwards = curve(base=-9.1, accuracy={1: -9.1, 2: -9.01, 4: -9.0, 8: -9.005})
    assert upwards.recommend(tolerance) == rank


def test_recommend_says_when_nothing_was_learnt() -> None:
    losses = curve(base=1.0, loss={1: 1.0, 2: 1.5})
    with pytest.warns(UserWarning, match="no rank is better than the base model: nothing was learnt"):
        assert losses.recommend() == 1
    assert curve(base=math.nan, loss={1: 1.0, 2: 0.5}).recommend() == 2  # no base model to compare with
    assert curve(base=math.nan, loss={1: 1.0, 2: 0.5}).gains() == {}
    assert curve(base=2.0, loss={1: 1.0, 2: math.nan}).gains() == {1: 1.0}


def test_the_curve_so_far_is_handed_out_after_each_row() -> None:
    seen: list[list[int | None]] = []
    rank_curve(
        adapted()[0],
        lambda m: {"loss": 1.0},
        progress=False,
        on_row=lambda so_far: seen.append([row.rank for row in so_far.rows]),
    )
    assert seen == [[1], [1, 2], [1, 2, 4], [None, 1, 2, 4]]


def test_recommend_knows_directions_and_asks_for_others() -> None:
    both = curve(eval_accuracy={1: 0.5, 2: 0.9, 4: 0.9}, zorp={1: 3, 2: 2, 4: 1})
    assert both.recommend() == 2
    with pytest.raises(ValueError, match="'zorp' is better is not known: pass greater_is_better"):
        both.recommend(metric="zorp")
    assert both.recommend(metric="zorp", greater_is_better=True) == 1
    assert both.recommend(metric="zorp", greater_is_better=False) == 4


def test_recommend_works_below_zero_and_without_numbers() -> None:
    # log-likelihoods: the best is -2, one per cent of it is 0.02
    assert curve(ll={1: -2.03, 2: -2.01, 4: -2.0}).recommend(0.01, greater_is_better=True) == 2
    assert curve(loss={1: math.nan, 2: math.inf, 4: 2.0}).recommend() == 4
    with pytest.raises(ValueError, match="no finite value"):
        curve(loss={1: math.nan}).recommend()


@pytest.mark.parametrize("tolerance", [-0.1, math.inf, math.nan, "1%", True])
def test_a_tolerance_that_means_nothing_is_refused(tolerance: object) -> None:
    with pytest.raises(ValueError, match="tolerance="):
        curve(loss={1: 1.0}).recommend(tolerance)


def test_an_unknown_metric_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"metric='f1' was not measured; there are \['loss'\]"):
        curve(loss={1: 1.0}).recommend(metric="f1")


def test_the_table_is_text_in_jupyter_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = curve(loss={1: 0.5, 2: 0.25})
    anywhere = found.table()
    shell = type("ZMQInteractiveShell", (), {})()  # by which rich knows Jupyter
    monkeypatch.setattr("builtins.get_ipython", lambda: shell, raising=False)
    assert "0.25" in found.table()
    assert found.table() == anywhere


def test_the_table_has_a_line_per_rank() -> None:
    lines = curve(base=3.5, loss={1: 2.25, 16: 1.23456}, perplexity={1: 1234567.0, 16: math.nan}).table().splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [["base", "3.5", "3.5"], ["1", "2.25", "1,234,567"], ["16", "1.235", "nan"]]


def test_json_and_back(tmp_path: Path) -> None:
    original = curve(base=3.5, loss={1: 0.1 + 0.2, 2: 1e-300})
    text = original.to_json(tmp_path / "new" / "curve.json")
    assert RankCurve.from_json(tmp_path / "new" / "curve.json") == original
    assert RankCurve.from_json(text) == original
    text = curve(loss={1: math.inf}).to_json()
    assert json.loads(text, parse_constant=pytest.fail) == {"rows": [{"rank": 1, "metrics": {"loss": None}}]}
    assert math.isnan(RankCurve.from_json(text)[1]["loss"])


@pytest.mark.parametrize("text", ["{}", '{"rows": 3}', '{"rows": [{"rank": 1}]}', "{oops"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no rank curve"):
        RankCurve.from_json(text)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_plots_are_of_the_kind_that_the_suffix_says(tmp_path: Path, suffix: str, start: bytes) -> None:
    picture = curve(base=3.5, loss={1: 2.2, 2: 2.0}, f1={1: 0.2, 2: 0.3}).plot(
        tmp_path / "new" / f"curve{suffix}", "title"
    )
    assert picture.read_bytes().startswith(start)


def test_plots_of_long_lists_and_of_one_rank(tmp_path: Path) -> None:
    curve(loss={rank: 1 / rank for rank in range(1, 65)}).plot(tmp_path / "long.svg")
    curve(loss={8: math.nan}).plot(tmp_path / "one.svg")


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be one of .png, .svg, .pdf; try 'curve.png'"):
        curve(loss={1: 1.0}).plot(tmp_path / "curve.bmp")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[plot\]'"):
        curve(loss={1: 1.0}).plot(tmp_path / "curve.png")


def test_matplotlib_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, peft_dynamic.ranks; print('matplotlib' in sys.modules, 'peft_dynamic.ranks' in sys.modules)"
    assert python("-c", code).split() == ["False", "True"]


# --- a value for each example


def sampled(**values: list[float]) -> RankCurve:
    """One metric, the loss, by example: base=..., r1=..., r2=..."""
    rows = []
    for name, losses in values.items():
        rank = None if name == "base" else int(name[1:])
        rows.append(RankRow(rank, {"loss": sum(losses) / len(losses)}, samples={"loss": losses}))
    return RankCurve(rows)


def test_a_metric_may_have_a_value_for_each_example() -> None:
    model, inputs = adapted()
    result = rank_curve(model, lambda m: {"total": m(inputs).sum(1), "one": 1.0}, progress=False)
    for rank in (1, 2, 4):
        with model.at_rank(rank):
            expected = model.eval()(inputs).sum(1).tolist()
        row = next(row for row in result.rows if row.rank == rank)
        assert row.samples == {"total": expected}
        assert row.metrics == {"total": pytest.approx(sum(expected) / len(expected)), "one": 1.0}


def test_the_standard_error_is_that_of_the_mean() -> None:
    row = sampled(r1=[1.0, 2.0, 3.0, 6.0]).rows[0]
    assert row.standard_error("loss") == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
    assert row.standard_error("accuracy") is None


def test_what_the_examples_cannot_tell_apart_is_no_reason_for_a_larger_rank() -> None:
    # rank 1 less rank 2, example by example: .3, -.1, .3, -.1; the mean .1, its standard error .2 / sqrt(3) = .1155
    losses = sampled(base=[3.0, 3, 3, 3], r1=[1.3, 0.9, 1.3, 0.9], r2=[1.0, 1, 1, 1])
    assert losses.recommend() == 1
    assert losses.recommend(standard_errors=0.8) == 2  # .1 / .1155 = .866
    assert losses.recommend(standard_errors=0.9) == 1
    assert losses.recommend(standard_errors=0) == 2
    assert losses.recommend(tolerance=0.05, standard_errors=0) == 1  # .1 of a gain of 2
    always = sampled(base=[3.0, 3, 3, 3], r1=[1.1, 1.1, 1.1, 1.1], r2=[1.0, 1, 1, 1])
    assert always.recommend() == 2
    with pytest.raises(ValueError, match="standard_errors=-1"):
        losses.recommend(standard_errors=-1)


def test_the_area_is_over_the_logarithm_of_the_rank() -> None:
    # trapezoids over log2: (1 + 3) / 2 * 1 + (3 + 5) / 2 * 2, over 3
    assert curve(loss={1: 1.0, 2: 3.0, 8: 5.0}, base=9.0).aurac() == pytest.approx(10 / 3)
    assert curve(loss={4: 2.0, 16: 2.0}).aurac("loss") == pytest.approx(2)
    for bad in (curve(loss={1: 1.0}), curve(loss={1: 1.0, 2: math.nan})):
        with pytest.raises(ValueError, match="at two ranks or more"):
            bad.aurac()


def test_the_picture_has_intervals_and_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []
    monkeypatch.setattr("peft_dynamic.reports.curve.save_figure", lambda figure, path, title: drawn.append(figure))
    losses = sampled(base=[3.0, 3, 3, 3], r1=[1.3, 0.9, 1.3, 0.9], r2=[1.0, 1, 1.2, 1])
    losses.plot(tmp_path / "curve.png")
    (axis,) = drawn[0].axes  # type: ignore[attr-defined]
    (bars,) = [each for each in axis.containers if each.has_yerr]
    (segments,) = bars[2]
    halves = [(high - low) / 2 for (_, low), (_, high) in segments.get_segments()]
    # less each example's mean, 1.15, .95, 1.25, .95: .15, -.05, .05, -.05 for rank 1; times sqrt(2 / 1)
    half = 1.96 * math.sqrt(sum((x - 0.025) ** 2 for x in (0.15, -0.05, 0.05, -0.05)) / 3 / 4) * math.sqrt(2)
    assert halves == pytest.approx([half, half])
    assert [text.get_text() for text in axis.texts] == ["recommended"]
    assert axis.texts[0].xy == (1, pytest.approx(1.1))
    losses.plot(tmp_path / "curve.png", mark=False)
    assert not drawn[1].axes[0].texts  # type: ignore[attr-defined]
    both = curve(loss={1: 1.0, 2: 0.9}, accuracy={1: 0.9, 2: 0.8}, base=2.0)
    for metric, rank in ((None, 2), ("loss", 2), ("accuracy", 1)):
        both.plot(tmp_path / "curve.png", metric=metric)
        assert [axis.texts[0].xy[0] for axis in drawn[-1].axes] == [rank, rank]  # type: ignore[attr-defined]
    flat = sampled(base=[3.0, 3, 3, 3], r1=[1.1, 1.1, 1.1, 1.1], r2=[1.0, 1, 1, 1])
    for tolerance, rank in ((0.01, 2), (0.1, 1)):
        flat.plot(tmp_path / "curve.png", tolerance=tolerance)
        assert drawn[-1].axes[0].texts[0].xy[0] == rank  # type: ignore[attr-defined]


# --- a stock LoRA, and budgets


def stock(**settings: object) -> tuple[nn.Module, torch.Tensor]:
    base, inputs = build("linear")
    config = {"r": 6, "lora_alpha": 8, "target_modules": ["a", "b", "head"]} | settings
    model = get_peft_model(base, LoraConfig(**config))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(key)))
    return model.eval(), inputs


def total(inputs: torch.Tensor) -> object:
    return lambda model: {"total": model(inputs).sum().item()}


def test_the_curve_of_a_stock_lora() -> None:
    model, inputs = stock(use_rslora=True)
    result = rank_curve(model, total(inputs), progress=False)
    assert [row.rank for row in result.rows] == [None, 1, 2, 4, 6]
    assert result[6]["total"] == model(inputs).sum().item()
    for rank in (1, 2, 4):
        with at_rank(model, rank):
            assert result[rank]["total"] == model(inputs).sum().item()
    assert all(row.parameters is None for row in result.rows)
    assert "parameters" not in result.table()


@pytest.mark.parametrize("by_data", [False, True])
def test_a_budget_has_the_ranks_of_the_resized_adapter(tmp_path: Path, by_data: bool) -> None:
    model, inputs = stock(rank_pattern={"b": 3}, alpha_pattern={"head": 2})
    generator = torch.Generator().manual_seed(9)
    moments = None
    if by_data:
        names = {name: module.r["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
        squares = {name: torch.randn(r, 2 * r, generator=generator).double() for name, r in names.items()}
        moments = AdapterMoments({name: x @ x.mT for name, x in squares.items()}, {}, 1)
    whole = 6 * (16 + 32) + 3 * (32 + 16) + 6 * (16 + 5)
    result = rank_curve(model, total(inputs), budgets=[0.5, 100], moments=moments, progress=False)
    assert [row.budget for row in result.rows] == [None, 0.5, 100]
    model.save_pretrained(tmp_path / "whole")
    for row in result.rows[1:]:
        resize_adapter(tmp_path / "whole", tmp_path / "small", parameters=row.budget, moments=moments)
        resized = PeftModel.from_pretrained(build("linear")[0], tmp_path / "small").eval()
        sizes = [p.numel() for name, p in resized.named_parameters() if "lora_" in name]
        assert row.parameters == sum(sizes) <= (whole * 0.5 if row.budget == 0.5 else 100)
        assert row.metrics["total"] == pytest.approx(resized(inputs).sum().item(), rel=1e-4)
    with at_rank(model, 1):  # the moments are gone
        plain = model(inputs).sum().item()
    assert rank_curve(model, total(inputs), ranks=[1], base=False, progress=False)[1]["total"] == plain


def test_a_module_may_get_rank_0_of_a_budget() -> None:
    model, _inputs = stock()
    ranks = budget_ranks(model, 60)
    assert sorted(ranks) == [rf"^(base_model\.model\.)?{name}" for name in ("a", "b", "head")]
    assert 0 in ranks.values()
    with at_rank(model, ranks):
        assert sorted(get_rank(model).values()) == sorted(ranks.values())


@pytest.mark.parametrize("budget", [0, 0.0, 1.5, -1, True, "0.5", math.nan])
def test_a_budget_that_means_nothing_is_refused(budget: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"parameters=.*: must be a count"):
        budget_ranks(stock()[0], budget)


def test_a_prefix_has_no_budget() -> None:
    model, _ = adapted(truncation="prefix")
    with pytest.raises(ValueError, match="truncation='prefix'"):
        budget_ranks(model, 0.5)


def test_ranks_and_budgets_in_one_picture_have_parameters_below(tmp_path: Path) -> None:
    model, inputs = stock()
    result = rank_curve(model, total(inputs), ranks=[1, 2], budgets=[0.2], base=False, progress=False)
    assert [(row.rank, row.parameters) for row in result.rows[:2]] == [(1, 117), (2, 234)]
    assert "budget 0.2" in result.table()
    assert result.plot(tmp_path / "curve.png").exists()
    back = RankCurve.from_json(result.to_json())
    assert back.rows == result.rows
    budgets = RankCurve([row for row in result.rows if row.budget])
    assert budgets.recommend(metric="total", greater_is_better=True) == result.rows[2].parameters


def test_moments_of_another_adapter_are_refused() -> None:
    model, inputs = stock()
    before = {name: type(module) for name, module in model.named_modules()}
    for moments, message in (
        (AdapterMoments({}, {}, 1), "of another adapter"),
        (AdapterMoments({f"base_model.model.{n}": torch.full((6, 6), math.nan) for n in "ab"}, {}, 1), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            rank_curve(model, total(inputs), moments=moments, progress=False)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_examples_that_are_not_finite_say_nothing(tmp_path: Path) -> None:
    rows = [
        RankRow(1, {"loss": math.nan}, samples={"loss": [math.nan, 1.0]}),
        RankRow(2, {"loss": 1.0}, samples={"loss": [1.0, 1.1]}),
    ]
    broken = RankCurve(rows)
    assert "NaN" not in broken.to_json()
    back = RankCurve.from_json(broken.to_json())
    assert math.isnan(back.rows[0].samples["loss"][0])
    assert broken.rows[0].standard_error("loss") is None
    assert broken.plot(tmp_path / "curve.png").exists()
    assert back.recommend() == 2


def test_a_noisy_rank_that_learnt_nothing_is_not_recommended() -> None:
    rows = sampled(base=[1.0, 1.0], r1=[0.0, 6.0], r2=[0.5, 0.5])
    assert rows.recommend() == 2


def test_numpy_s_numbers_are_written_down() -> None:
    import numpy as np

    model, inputs = stock()
    arguments = {"ranks": np.array([2, 1]), "budgets": np.array([100, 50]), "base": False, "progress": False}
    result = rank_curve(model, total(inputs), **arguments)
    assert result.ranks == [1, 2]
    assert RankCurve.from_json(result.to_json()).rows == result.rows
    mixed = rank_curve(model, total(inputs), budgets=[100, 1.0], base=False, progress=False)
    assert [row.budget for row in mixed.rows] == [1.0, 100]
    assert mixed.rows[0].parameters == 681  # the head has 5 outputs, and no sixth component
    assert RankCurve.from_json(mixed.to_json()).rows == mixed.rows


def test_a_budget_that_leaves_nothing_is_refused() -> None:
    model, inputs = stock()
    with pytest.raises(ValueError, match=r"parameters=1: no module would be left; a component takes 21 or more\."):
        rank_curve(model, total(inputs), budgets=[1], progress=False)


def test_a_budget_for_an_adapter_without_training_names_the_cause(tmp_path: Path) -> None:
    zero = "all updates of the adapter are zero, as before training, where B is zero: .* Train the adapter first"
    for config in (LoraConfig(r=4, target_modules=["a", "b"]), DyLoRAConfig(r=4, target_modules=["a", "b"])):
        base, inputs = build("linear")
        model = get_peft_model(base, config)
        with pytest.raises(ValueError, match=f"parameters=100: {zero}"):
            rank_curve(model, total(inputs), budgets=[100], progress=False)
        model.save_pretrained(tmp_path / config.peft_type.lower())
    with pytest.raises(ValueError, match=f"parameters=100: {zero}"):
        resize_adapter(tmp_path / "lora", tmp_path / "out", parameters=100)
