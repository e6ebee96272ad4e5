"""A stock LoRA from an adapter's files alone is the one that `export_lora` writes of the loaded model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

from peft_dynamic import export_lora
from peft_dynamic.algebra.checkpoint import write_checkpoint
from peft_dynamic.algebra.product import Product
from peft_dynamic.algebra.stock import is_calibrated, needs_order, stock_checkpoint, untold
from peft_dynamic.tuners.dylora.layer import ranked_layers
from tests.conformance.cases import CASES, perturb
from tests.conformance.test_conformance import compute
from tests.stock_cases import build
from tests.tuners.common import adapted, rows, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
]


def told(folder: Path) -> str | None:
    written = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return untold(folder, PeftConfig.from_pretrained(folder), written)


def both(model: Any, folder: Path, rank: int | None, order: list[str] | None = None) -> list[dict[str, torch.Tensor]]:
    """The tensors that `export_lora` writes of the model, and those made of its files."""
    model.save_pretrained(folder / "whole")
    export_lora(model, folder / "loaded", rank=rank)
    write_checkpoint(stock_checkpoint(folder / "whole", rank, order), folder / "files")
    return [load_file(folder / name / "adapter_model.safetensors") for name in ("loaded", "files")]


# Each method and variation on some layers, and two of them on all.
SOME = ("linear", "experts", "convolutions", "patterns")
KNOWN = [
    case
    for case in CASES
    if "loretta" not in case.name
    and case.layers != "lora_bias"
    and (case.layers in SOME or case.name in (f"dylora-{case.layers}", f"dylora-paper-mixer-{case.layers}"))
]


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case.name)
def test_the_files_suffice_to_the_bit(case: Any, tmp_path: Path) -> None:
    model, inputs = case.perturbed()
    rank = case.ranks[1] if case.ranked else None
    loaded, files = both(model, tmp_path, rank)
    assert told(tmp_path / "whole") is None
    assert {name: value.shape for name, value in loaded.items()} == {name: value.shape for name, value in files.items()}
    assert [name for name, value in loaded.items() if not torch.equal(value, files[name])] == []
    outputs = []
    for name in ("loaded", "files"):
        stock = PeftModel.from_pretrained(build(case.layers)[0], tmp_path / name).eval()
        outputs.append(compute(stock, inputs))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)  # the scales too
    with case.at(model, rank):
        torch.testing.assert_close(outputs[1], compute(model, inputs), rtol=1e-4, atol=case.tolerance)


@pytest.mark.parametrize(
    "case", [case for case in CASES if "loretta-rep-linear" in case.name or "lora_bias" in case.name]
)
def test_what_the_files_do_not_tell_is_known(case: Any, tmp_path: Path) -> None:
    case.perturbed()[0].save_pretrained(tmp_path)
    expected = "the shapes of its tensor trains" if "loretta" in case.name else "how its base model is used"
    assert told(tmp_path) == expected


def calibrated(**settings: Any) -> Any:
    model = adapted(**settings)
    perturb(model)
    model.eval().calibrate([{"input_ids": rows(2), "labels": rows(2)}])
    return model


@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"q_proj": 2, "up_proj": 5}, "use_mixer": True}])
def test_a_calibration_comes_along_in_the_order_of_the_layers(settings: dict[str, Any], tmp_path: Path) -> None:
    model = calibrated(**settings)
    order = [name for name, _ in ranked_layers(model)]
    loaded, files = both(model, tmp_path, 2)
    assert is_calibrated(tmp_path / "whole")
    assert not needs_order(tmp_path / "whole")  # the file says it
    assert [name for name, value in loaded.items() if not torch.equal(value, files[name])] == []
    path = tmp_path / "whole" / "adapter_model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if not name.endswith("moments_of")}
    save_file(tensors, path, metadata={"format": "pt"})  # as an earlier version wrote it
    assert needs_order(tmp_path / "whole")
    write_checkpoint(stock_checkpoint(tmp_path / "whole", 2, ["another", *order]), tmp_path / "ordered")
    files = load_file(tmp_path / "ordered" / "adapter_model.safetensors")
    assert [name for name, value in loaded.items() if not torch.equal(value, files[name])] == []
    write_checkpoint(stock_checkpoint(tmp_path / "whole", 2, order[::-1]), tmp_path / "wrong")
    wrong = load_file(tmp_path / "wrong" / "adapter_model.safetensors")
    assert [name for name, value in loaded.items() if not torch.equal(value, wrong[name])] != []
    with pytest.raises(ValueError, match="do not fit its"):
        stock_checkpoint(tmp_path / "whole", 2, order[1:])


def test_a_calibration_of_other_factors_is_not_used(tmp_path: Path) -> None:
    model = calibrated()
    model.save_pretrained(tmp_path / "before")
    path = tmp_path / "before" / "adapter_model.safetensors"
    tensors = load_file(path)
    step = next(name for name in tensors if name.endswith(".lora_schedule.step"))
    save_file(tensors | {step: tensors[step] + 1}, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="has been trained since it was calibrated"):
        stale = stock_checkpoint(tmp_path / "before", 2)
    plain = adapted()
    perturb(plain)
    plain.save_pretrained(tmp_path / "plain")
    expected = stock_checkpoint(tmp_path / "plain", 2)
    for module, product in expected.products.items():
        assert torch.equal(product.a, stale.products[module].a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_as_peft_widens_it(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(use_mixer=True)
    perturb(model)
    model.to(dtype).save_pretrained(tmp_path / "half")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "half")
    export_lora(again, tmp_path / "loaded", rank=2)
    write_checkpoint(stock_checkpoint(tmp_path / "half", 2), tmp_path / "files")
    loaded, files = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("loaded", "files"))
    assert [name for name, value in loaded.items() if not torch.equal(value, files[name])] == []


def test_an_untrained_rank_is_told(tmp_path: Path) -> None:
    for name, sampling in [("drawn", "uniform"), ("whole", "full")]:
        model = adapted(ranks=[1, 4, 8], rank_sampling=sampling)
        perturb(model)
        model.save_pretrained(tmp_path / name)
    with pytest.warns(UserWarning, match=r"rank 2 is not one of the trained ranks \[1, 4, 8\]"):
        stock_checkpoint(tmp_path / "drawn", 2)
    stock_checkpoint(tmp_path / "whole", 2)


def test_the_scale_survives_the_configuration() -> None:
    """lora_alpha / r is the model's scale to the bit, for ranks and alphas whose quotients no float holds."""
    for rank in range(1, 65):
        for alpha in (1, 3, 16, 7.3, 10 / 3, 1e-9):
            scale = alpha / rank
            product = Product(torch.zeros(rank, 3), torch.zeros(2, rank), scale, ("", ""))
            assert product.alpha / rank == scale
    assert Product(torch.zeros(6, 3), torch.zeros(2, 6), 2.2 / 6, ("", "")).alpha == 2.2
