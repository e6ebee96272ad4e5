"""The rank curve: what it measures, what it leaves as it was, and what it recommends."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_dynamic import DyLoRAConfig
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


@pytest.mark.parametrize("returned", [None, 3.0, {"loss": "low"}, {"loss": [1, 2]}, {}])
def test_what_is_no_dict_of_numbers_is_refused(returned: object) -> None:
    with pytest.raises(TypeError, match="evaluate"):
        rank_curve(adapted()[0], lambda m: returned, progress=False)


@pytest.mark.parametrize("ranks", [[], [0], [1, 5]])
def test_bad_ranks_are_refused_before_anything_is_evaluated(ranks: list) -> None:
    with pytest.raises(ValueError, match="rank"):
        rank_curve(adapted()[0], lambda m: pytest.fail("evaluated"), ranks=ranks, progress=False)


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
    with pytest.raises(ImportError, match=r"peft-dynamic\[plot\]"):
        curve(loss={1: 1.0}).plot(tmp_path / "curve.png")


def test_matplotlib_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, peft_dynamic.ranks; print('matplotlib' in sys.modules, 'peft_dynamic.ranks' in sys.modules)"
    assert python("-c", code).split() == ["False", "True"]
