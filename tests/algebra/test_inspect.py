"""What `inspect` says of an adapter: the energy by hand, the rank that keeps nearly all, and the picture."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_dynamic.algebra import inspect
from peft_dynamic.algebra.checkpoint import LoraCheckpoint, read_checkpoint
from tests.tuners.common import tiny_llama

ENDS = (".lora_A.weight", ".lora_B.weight")


@pytest.fixture
def read(tmp_path: Path) -> LoraCheckpoint:
    """q_proj of layer 0 has the singular values 2 and 1, that of layer 1 has 10 and 1; v_proj is 0."""
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    for i, values in enumerate(([2.0, 1.0], [10.0, 1.0])):
        layer = model.get_base_model().model.layers[i].self_attn.q_proj
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(torch.eye(2, 32))
            layer.lora_B["default"].weight.copy_(torch.eye(32, 2) * torch.tensor(values))
    model.save_pretrained(tmp_path / "adapter")
    return read_checkpoint(tmp_path / "adapter")


def test_the_energy_kept_and_the_rank_that_keeps_nearly_all(read: LoraCheckpoint) -> None:
    kept = {name.removeprefix("base_model.model.model."): shares for name, shares in inspect.energy_kept(read).items()}
    assert kept["layers.0.self_attn.q_proj"] == pytest.approx([0.8, 1.0])
    assert kept["layers.1.self_attn.q_proj"] == pytest.approx([100 / 101, 1.0])
    assert kept["layers.0.self_attn.v_proj"] == [1.0, 1.0]  # nothing can be lost of an update that is 0
    assert inspect.rank_for(kept, 0.8) == 1
    assert inspect.rank_for(kept) == 2
    assert inspect.rank_sentence(kept) == (
        "No rank below 2, the largest, keeps 99% of the energy in every module: "
        "layers.0.self_attn.q_proj needs all of it."
    )
    assert inspect.rank_sentence({"one": [0.5, 0.995, 1.0], "two": [1.0, 1.0, 1.0]}) == (
        "Rank 2 keeps 99% of the energy in every module; one needs the most."
    )


def test_the_table_ends_with_the_median_and_the_lowest(read: LoraCheckpoint) -> None:
    lines = inspect.energy_table(read).splitlines()
    assert lines[-4].split() == ["│", "median", "of", "all", "│", "│", "99.5%", "│", "100.0%", "│"]
    assert lines[-3].split() == ["│", "lowest", "of", "all", "│", "│", "80.0%", "│", "100.0%", "│"]


def test_the_summary_has_the_same_numbers(read: LoraCheckpoint) -> None:
    found = inspect.summary(read)
    assert (found["type"], found["largest_rank"], found["bytes"]) == ("LORA", 2, 4 * found["numbers"])
    assert found["numbers"] == 2 * 2 * (32 + 32) + 2 * 2 * (32 + 16)
    assert found["rank_for_energy"] == {"share": 0.99, "rank": 2}
    module = found["modules"]["model.layers.0.self_attn.q_proj"]
    assert (module["rank"], module["numbers"]) == (2, 128)
    assert module["energy_kept"] == pytest.approx([0.8, 1.0])


def test_a_module_is_named_by_as_much_as_tells_it_from_others() -> None:
    names = ["layer.0.attention.output.dense", "layer.1.output.dense", "layer.0.attention.self.query", "lm_head"]
    assert list(inspect._kinds(names).values()) == ["attention.output.dense", "output.dense", "query", "lm_head"]


def test_the_picture_has_a_line_for_each_module_and_names_the_worst(
    read: LoraCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    save = inspect.save_figure
    monkeypatch.setattr(inspect, "save_figure", lambda figure, *rest: drawn.append(figure) or save(figure, *rest))
    path = inspect.energy_plot(read, tmp_path / "new" / "energy.png", title="one")
    assert path.read_bytes().startswith(b"\x89PNG")
    (axis,) = drawn[0].axes
    thin = [line for line in axis.get_lines() if line.get_linewidth() < 0.7]
    assert [list(line.get_ydata()) for line in thin][:2] == [pytest.approx([0.8, 1.0]), pytest.approx([100 / 101, 1.0])]
    assert len(thin) == 4
    assert axis.get_legend_handles_labels()[1] == [
        "q_proj, median of 2",
        "v_proj, median of 2",
        "median of all",
        "needs the most:\nmodel.layers.0.self_attn.q_proj",
    ]
    assert [text.get_text() for text in axis.texts] == ["rank 2: 99% in every module"]
    with pytest.raises(ValueError, match=r"must be one of \.png"):
        inspect.energy_plot(read, tmp_path / "energy.txt")


def test_modules_stand_by_kind_and_number() -> None:
    names = [f"model.layers.{i}.self_attn.{kind}" for i in (10, 2) for kind in ("v_proj", "q_proj")]
    ordered = [f"model.layers.{i}.self_attn.{kind}" for kind in ("q_proj", "v_proj") for i in (2, 10)]
    assert inspect.in_order(names) == ordered
