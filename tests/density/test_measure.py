"""The density report: counts by hand, and what it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_dynamic.density import ActivationDensityLoss, DensityReport, DensityRow, measure_density
from tests.density.models import batch_for, build, with_lora


class Given(nn.Module):
    """Its activations are its input."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.scale = nn.ReLU(), nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        return self.act(x * self.scale)


def test_counts_by_hand() -> None:
    x = torch.tensor([[[0.0, 0.5, 2.0, -1.0], [3.0, 0.0, 0.0, 0.0]]])  # (1, 2, 4): 2 and 1 of 4 active
    mask = torch.tensor([[1, 0]])
    batches = [{"x": x}, {"x": x, "attention_mask": mask}]
    report = measure_density(Given(), batches, threshold=1.0, activation_modules="act")
    (row,) = report.rows
    # exact: 3 of 8, then 2 of 4; above 1: 2 of 8, then 1 of 4
    assert (row.exact, row.above, row.activations, row.dtype) == (5 / 12, 3 / 12, 12, "float32")
    everything = measure_density(Given(), batches, 1.0, "act", include_padding=True)
    assert everything.rows[0].exact == 6 / 16
    assert measure_density(Given(), batches, 1.0, "act", max_batches=1).rows[0].exact == 3 / 8
    assert measure_density(Given(), [(x, mask)], 1.0, "act").rows[0].exact == 2 / 4
    assert measure_density(Given().bfloat16(), [x.bfloat16()], 1.0, "act").rows[0].dtype == "bfloat16"
    called = measure_density(Given(), [x], 1.0, "act", forward=lambda model, batch: model(2 * batch))
    assert called.rows[0].above == 2 / 8


def test_a_relu_model_gets_sparser_with_the_weight() -> None:
    means = []
    for weight in (0.0, 1.0, 10.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        density = ActivationDensityLoss(weight, 0.1, activation_modules="1").attach(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        x = torch.randn(64, 8)
        for _ in range(100):
            loss = (model(x) - x).pow(2).mean()
            (loss + density.penalty() if weight else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        means.append(measure_density(model, [x], activation_modules="1").mean())
    assert means[0] > 1.3 * means[1] > 1.3 * means[2]


def test_modes_masks_and_stacks_of_real_models() -> None:
    model, batch = build("T5"), batch_for("T5")
    model.decoder.eval()
    modes = [module.training for module in model.modules()]
    report = measure_density(model, [batch])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert [row.stack for row in report.rows] == ["encoder", "encoder", "decoder", "decoder"]
    real = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
    assert [row.activations for row in report.rows] == [48 * real[0]] * 2 + [48 * real[1]] * 2
    assert report.mean() == pytest.approx((report.mean("encoder") + report.mean("decoder")) / 2)
    lora = measure_density(with_lora("Llama"), [batch_for("Llama")], threshold=0.1)
    assert lora.mean() == 1.0  # SiLU is 0 at 0 only
    assert 0 < lora.mean(exact=False) < 1


def report_of(exact: float) -> DensityReport:
    rows = [
        DensityRow(f"{stack}.{i}.act", stack, exact / (i + 1), exact / (i + 2), 8, "float32")
        for stack in ("encoder", "decoder")
        for i in range(3)
    ]
    return DensityReport(1e-3, rows)


def test_the_report_is_written_and_read(tmp_path: Path) -> None:
    report = report_of(0.8)
    assert report.mean("encoder") == pytest.approx(0.8 * (1 + 1 / 2 + 1 / 3) / 3)
    assert report_of(0.2).reduction(report) == pytest.approx((0.8 - 0.2) / 0.8)
    table = report.table()
    assert "80.00" in table
    assert "mean of the decoder" in table
    assert DensityReport.from_json(report.to_json(tmp_path / "a" / "density.json")) == report
    assert DensityReport.from_json(tmp_path / "a" / "density.json") == report
    assert json.loads(report.to_json())["mean"]["all"]["exact"] == pytest.approx(report.mean())
    pytest.importorskip("matplotlib")
    picture = report_of(0.3).plot(tmp_path / "b" / "density.png", title="Tiny", before=report)
    assert picture.stat().st_size > 10_000


def test_what_cannot_be_measured_or_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threshold must be a number of at least 0, got -1"):
        measure_density(Given(), [], threshold=-1, activation_modules="act")
    with pytest.raises(ValueError, match="no activation was counted"):
        measure_density(Given(), [], activation_modules="act")
    with pytest.raises(ValueError, match="the suffix says the format"):
        report_of(1.0).plot(tmp_path / "density.jpeg2")
    with pytest.raises(ValueError, match="no density report"):
        DensityReport.from_json("{}")
    with pytest.raises(ValueError, match="stack='middle'"):
        report_of(1.0).mean("middle")
