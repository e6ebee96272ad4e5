"""A rank of a saved DyLoRA adapter from its file alone: bit for bit what export_lora writes of the loaded one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_dynamic import DyLoRAConfig, export_lora
from peft_dynamic.algebra.product import Product
from peft_dynamic.algebra.stock import rank_at, write_rank
from peft_dynamic.tuners.dylora.weigh import weigh
from tests.conformance.cases import perturb
from tests.stock_cases import CASES, build, compute

RULES: dict[str, dict[str, Any]] = {
    "svd": {},
    "paper": {"truncation": "prefix", "scaling": "alpha/b"},
    "mixer": {"use_mixer": True, "scaling": "alpha/sqrt(r*b)"},
    "prefix-mixer": {"use_mixer": True, "truncation": "prefix", "scaling": "alpha/sqrt(b)"},
}


def adapted(case: str, **rules: Any) -> Any:
    config = {"r": 8, "ranks": [2, 4, 8], "lora_alpha": 5} | CASES[case].config | rules
    model = get_peft_model(build(case)[0], DyLoRAConfig(**config))
    perturb(model)
    return model.eval()


def calibrated(model: Any) -> Any:
    """By made-up moments, of which each module has others."""
    from peft_dynamic.tuners.moments import AdapterMoments

    generator = torch.Generator().manual_seed(3)
    inputs, losses = {}, {}
    for name, module in model.named_modules():
        if "lora_views" not in vars(module) and not hasattr(module, "lora_views"):
            continue
        shape = module.lora_views["default"].gram_shape
        for into in (inputs, losses):
            root = torch.randn(shape, generator=generator)
            into[name] = (root @ root.mT)[0]
    weigh(model, "default", AdapterMoments(inputs=inputs, losses=losses, tokens=1))
    return model


def same_adapter(ours: Path, theirs: Path) -> None:
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type", "bias", "modules_to_save", "task_type")
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs)]
    assert [configs[0][name] for name in fields] == [configs[1][name] for name in fields]


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("case", sorted(set(CASES) - {"lora_bias"}))
def test_the_file_gives_what_the_model_gives(tmp_path: Path, case: str, rules: str) -> None:
    model = adapted(case, **RULES[rules])
    model.save_pretrained(tmp_path / "whole")
    for rank in (2, 8):
        write_rank(tmp_path / "whole", tmp_path / f"ours-{rank}", rank)
        export_lora(model, tmp_path / f"theirs-{rank}", rank=rank)
        same_adapter(tmp_path / f"ours-{rank}", tmp_path / f"theirs-{rank}")


@pytest.mark.parametrize("case", ["llama", "patterns", "embedding"])
def test_a_calibrated_file_too(tmp_path: Path, case: str) -> None:
    model = adapted(case)
    model.save_pretrained(tmp_path / "plain")
    calibrated(model).save_pretrained(tmp_path / "whole")
    write_rank(tmp_path / "whole", tmp_path / "ours", 2)
    export_lora(model, tmp_path / "theirs", rank=2)
    same_adapter(tmp_path / "ours", tmp_path / "theirs")
    write_rank(tmp_path / "plain", tmp_path / "uncalibrated", 2)
    with pytest.raises(AssertionError):  # the calibration makes a difference
        same_adapter(tmp_path / "uncalibrated", tmp_path / "theirs")


def changed(folder: Path, **values: torch.Tensor | None) -> None:
    """The file with other buffers of its schedule."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = next(key for key in tensors if ".lora_schedule." in key).rpartition(".")[0]
    for name, value in values.items():
        tensors.pop(f"{prefix}.{name}", None)
        if value is not None:
            tensors[f"{prefix}.{name}"] = value
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_calibration_that_training_has_outrun_counts_no_more(tmp_path: Path) -> None:
    model = adapted("llama")
    model.save_pretrained(tmp_path / "plain")
    calibrated(model).save_pretrained(tmp_path / "whole")
    changed(tmp_path / "whole", step=torch.tensor(7))
    write_rank(tmp_path / "plain", tmp_path / "plain-2", 2)
    with pytest.warns(UserWarning, match="has been trained since it was calibrated"):
        write_rank(tmp_path / "whole", tmp_path / "whole-2", 2)
    same_adapter(tmp_path / "whole-2", tmp_path / "plain-2")


@pytest.mark.parametrize(
    "names", [None, torch.tensor(list(b"nothing"), dtype=torch.uint8), torch.tensor([255, 254], dtype=torch.uint8)]
)
def test_a_calibration_without_its_names_is_refused(tmp_path: Path, names: torch.Tensor | None) -> None:
    calibrated(adapted("llama")).save_pretrained(tmp_path / "whole")
    changed(tmp_path / "whole", moments_of=names)
    with pytest.raises(ValueError, match="does not say which measurement is of which module"):
        write_rank(tmp_path / "whole", tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_what_has_no_such_rank_is_refused(tmp_path: Path) -> None:
    adapted("llama").save_pretrained(tmp_path / "whole")
    for rank in (0, 9, 2.0, True):
        with pytest.raises(ValueError, match="must be a whole number from 1 to 8, the adapter's r"):
            write_rank(tmp_path / "whole", tmp_path / "out", rank)
    with pytest.raises(FileExistsError, match="is an adapter that is read"):
        write_rank(tmp_path / "whole", tmp_path / "whole", 2)
    get_peft_model(build("llama")[0], LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"is a LORA adapter, which has one rank\. Use resize_adapter"):
        write_rank(tmp_path / "stock", tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("own", "at_two", "at_six"), [(8, 2, 6), (4, 2, 4), (16, 4, 12)])
def test_the_rank_of_a_module_that_is_capped_or_fused(own: int, at_two: int, at_six: int) -> None:
    product = Product(torch.zeros(own, 3), torch.zeros(5, own), 1.0, (".a", ".b"))
    assert (rank_at(2, product, 8), rank_at(6, product, 8), rank_at(8, product, 8)) == (at_two, at_six, own)


def test_stock_peft_computes_what_the_model_computes(tmp_path: Path) -> None:
    model, inputs = adapted("llama"), build("llama")[1]
    model.save_pretrained(tmp_path / "whole")
    write_rank(tmp_path / "whole", tmp_path / "out", 4)
    with model.at_rank(4):
        expected = compute(model, inputs)
    stock = PeftModel.from_pretrained(build("llama")[0], tmp_path / "out").eval()
    torch.testing.assert_close(compute(stock, inputs), expected, rtol=0, atol=0)
