"""An exported rank, loaded by stock PEFT in a process that never imports peft_dynamic, computes what ours computes."""

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_dynamic import DyLoRAConfig, MoSLoRAConfig
from peft_dynamic.export import export_lora
from tests.processes import python
from tests.stock_cases import CASES, build, compute

# PEFT says these for a stock LoRA of the same settings too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"),
    # transformers about itself, and PEFT about it, when add_adapter or get_peft_model meets a transformers model
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:rank .* is not one of the trained ranks:UserWarning"),
]
EXPORTS = [(name, i) for name, case in CASES.items() for i in range(len(case.ranks))]


def perturb(model: nn.Module) -> None:
    """Random values for all that training would change: an adapter at its start is zero at every rank."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(name: str, **settings: object) -> tuple[nn.Module, torch.Tensor]:
    base, inputs = build(name)
    ranks = [2, 4, 8] if name == "convolutions" else None
    model = get_peft_model(
        base, DyLoRAConfig(**({"r": 8, "lora_alpha": 16, "ranks": ranks} | CASES[name].config | settings))
    )
    perturb(model)
    return model.eval(), inputs


def mixed(name: str) -> tuple[nn.Module, torch.Tensor]:
    base, inputs = build(name)
    model = get_peft_model(base, MoSLoRAConfig(**({"r": 8, "lora_alpha": 16} | CASES[name].config)))
    perturb(model)
    return model.eval(), inputs


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """case-index -> (what we compute, what stock PEFT computes), all in one other process."""
    folder, ours = tmp_path_factory.mktemp("stock"), {}
    for name in CASES:
        model, inputs = mixed(name)
        export_lora(model, folder / f"{name}-moslora")
        ours[f"{name}-moslora"] = compute(model, inputs)
    for name, case in CASES.items():
        for i, rank in enumerate(case.ranks):
            model, inputs = adapted(name)  # anew: PEFT's attention merges and unmerges in each forward, which rounds
            export_lora(model, folder / f"{name}-{i}", rank=rank)
            with model.at_rank(rank):
                ours[f"{name}-{i}"] = compute(model, inputs)
    script = Path(__file__).with_name("stock_cases.py")
    python(script, folder)
    return {name: (output, load_file(folder / f"{name}.safetensors")["output"]) for name, output in ours.items()}


@pytest.mark.parametrize(("name", "i"), EXPORTS, ids=[f"{name}-{CASES[name].ranks[i]}" for name, i in EXPORTS])
def test_stock_peft_computes_the_same_bits(stock: dict, name: str, i: int) -> None:
    ours, theirs = stock[f"{name}-{i}"]
    assert torch.equal(ours, theirs), f"greatest difference {(ours - theirs).abs().max():.3g}"


@pytest.mark.parametrize("name", CASES)
def test_stock_peft_computes_the_same_bits_as_a_mixer_folded_into_a(stock: dict, name: str) -> None:
    ours, theirs = stock[f"{name}-moslora"]
    assert torch.equal(ours, theirs), f"greatest difference {(ours - theirs).abs().max():.3g}"


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
def test_a_mixer_export_has_no_mixer_and_one_rank(tmp_path: Path) -> None:
    model, _ = mixed("linear")
    with pytest.raises(ValueError, match="rank=4: the adapter 'default' is of MoSLoRA, which has one rank"):
        export_lora(model, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()
    export_lora(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert not [key for key in tensors if "mixer" in key]
    layer = model.base_model.model.a
    m, a = layer.lora_mixer["default"].weight[0], layer.lora_A["default"]._parameters["weight"]
    assert torch.allclose(tensors["base_model.model.a.lora_A.weight"], (m @ a).detach(), atol=1e-6)
    assert "peft_dynamic  #" not in (tmp_path / "out/README.md").read_text()


def test_the_files_are_a_stock_checkpoint(tmp_path: Path) -> None:
    model, _ = adapted("linear", ranks=[1, 2, 8])
    assert export_lora(model, tmp_path / "out", rank=2) == tmp_path / "out"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 2
    assert set(config) <= {field.name for field in fields(LoraConfig)}
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["inference_mode"]
    shapes = {key: tuple(value.shape) for key, value in load_file(tmp_path / "out/adapter_model.safetensors").items()}
    sizes = {"a": (16, 32), "b": (32, 16), "head": (16, 5)}
    assert shapes == {f"base_model.model.{key}.lora_A.weight": (2, n) for key, (n, _) in sizes.items()} | {
        f"base_model.model.{key}.lora_B.weight": (n, 2) for key, (_, n) in sizes.items()
    }
    assert "peft_dynamic  #" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("scaling", "alpha"),
    [("alpha/b", 16), ("alpha/r", 4), ("alpha/sqrt(b)", 16 * 2**0.5), ("alpha/sqrt(r*b)", 8)],
)
def test_alpha_carries_the_scale_rule(tmp_path: Path, scaling: str, alpha: float) -> None:
    # r=8, b=2: the stock scale alpha' / 2 is 16/2, 16/8, 16/sqrt(2) and 16/sqrt(8*2)
    model, _ = adapted("linear", scaling=scaling)
    export_lora(model, tmp_path / "out", rank=2)
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())["lora_alpha"]
    assert written == alpha
    assert isinstance(written, type(alpha))


def test_patterns_say_which_modules_differ(tmp_path: Path) -> None:
    model, _ = adapted("patterns", scaling="alpha/b")
    export_lora(model, tmp_path / "out", rank=3)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (3, {"^b": 2})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (16, {"^head": 3})


def test_no_rank_means_the_set_rank_which_stays(tmp_path: Path) -> None:
    model, _ = adapted("linear")
    model.set_rank(3)
    export_lora(model, tmp_path / "set")
    export_lora(model, tmp_path / "other", rank=5)
    assert [json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] for name in ("set", "other")] == [
        3,
        5,
    ]
    assert model.get_rank() == 3


def test_one_adapter_of_two_is_written(tmp_path: Path) -> None:
    model, inputs = adapted("linear")
    model.add_adapter("second", DyLoRAConfig(r=4, lora_alpha=16, target_modules=["a"]))
    model.set_adapter("second")
    perturb(model)
    export_lora(model, tmp_path / "second", rank=2, adapter_name="second")
    loaded = PeftModel.from_pretrained(build("linear")[0], tmp_path / "second").eval()
    with model.at_rank(2, "second"):
        assert torch.equal(compute(loaded, inputs), compute(model, inputs))


def test_a_transformers_model_with_an_added_adapter(tmp_path: Path) -> None:
    model, inputs = build("llama")
    model.add_adapter(DyLoRAConfig(r=8, lora_alpha=16, target_modules="all-linear"), "mine")
    perturb(model)
    model.eval()
    export_lora(model, tmp_path / "out", rank=2)
    from peft_dynamic import set_rank

    set_rank(model, 2)
    fresh = build("llama")[0]
    fresh.load_adapter(str(tmp_path / "out"))
    assert torch.equal(compute(fresh, inputs), compute(model, inputs))
    wrapped = PeftModel.from_pretrained(build("llama")[0], tmp_path / "out").eval()
    assert torch.equal(compute(wrapped, inputs), compute(model, inputs))


def test_a_stock_adapter_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    model, _ = adapted("linear")
    (tmp_path / "notes.txt").write_text("mine")
    export_lora(model, tmp_path, rank=2)
    export_lora(model, tmp_path, rank=4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_adapter_with_all_ranks_is_not_overwritten(tmp_path: Path) -> None:
    model, _ = adapted("linear")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a DYLORA adapter.*Pass another folder"):
        export_lora(model, tmp_path, rank=2)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(FileExistsError, match="is a file; pass a folder"):
        export_lora(adapted("linear")[0], tmp_path / "out", rank=2)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted("linear")
    export_lora(model, tmp_path / "out", rank=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("peft_dynamic.export.save_file", full)
    for target in ("out", "new"):
        with pytest.raises(OSError, match="No space"):
            export_lora(model, tmp_path / target, rank=4)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert model.get_rank() == 8


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_out_of_range_is_refused(tmp_path: Path, rank: int) -> None:
    with pytest.raises(ValueError, match=r"outside 1\.\.8"):
        export_lora(adapted("linear")[0], tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


def test_a_model_without_our_adapter_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(build("linear")[0], IA3Config(target_modules=["a"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="has no adapter of peft_dynamic"):
        export_lora(model, tmp_path / "out")


def test_after_hotswap_padding_the_part_in_use_is_written(tmp_path: Path) -> None:
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model, inputs = adapted("linear")
    model.set_rank(3)
    expected = compute(model, inputs)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    export_lora(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(build("linear")[0], tmp_path / "out").eval()
    assert torch.equal(compute(loaded, inputs), expected)


CHILD = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import {auto}
torch.manual_seed(0)
base = {auto}.from_pretrained({path!r}, dtype=torch.float32)
model = PeftModel.from_pretrained(base, {adapter!r}).eval()
with torch.no_grad():
    output = model(torch.arange(5, 45).view(2, 20))
save_file({{"output": output[0].contiguous()}}, {result!r})
assert not [name for name in sys.modules if name.startswith("peft_dynamic")]
"""


@pytest.mark.parametrize(
    ("auto", "rank"),
    [
        pytest.param("AutoModelForCausalLM", 4, marks=pytest.mark.model("smollm2")),
        pytest.param("AutoModel", 1, marks=pytest.mark.model("minilm")),
        pytest.param("AutoModel", 8, marks=pytest.mark.model("minilm")),
    ],
)
def test_a_pretrained_model_computes_the_same_bits(tmp_path: Path, model_path: Path, auto: str, rank: int) -> None:
    import transformers

    base = getattr(transformers, auto).from_pretrained(model_path, dtype=torch.float32)
    model = get_peft_model(base, DyLoRAConfig(r=8, lora_alpha=16, ranks=[1, 4, 8], target_modules="all-linear")).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.02)
    export_lora(model, tmp_path / "out", rank=rank)
    with torch.no_grad(), model.at_rank(rank):
        ours = model(torch.arange(5, 45).view(2, 20))[0]
    result = tmp_path / "result.safetensors"
    code = CHILD.format(auto=auto, path=str(model_path), adapter=str(tmp_path / "out"), result=str(result))
    python("-c", code)
    assert torch.equal(ours, load_file(result)["output"])


NAMES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("target", [".", "..", "../here", "new/", "new/..", "./new/../new", "link", "link/", "../out"])
def test_an_export_writes_its_three_files_and_moves_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    here, there = tmp_path / "up" / "here", tmp_path / "there"
    for folder in (here, there, here / "kept"):
        folder.mkdir(parents=True)
        (folder / "mine.txt").write_text("mine")
    (here / "link").symlink_to(there)
    monkeypatch.chdir(here)
    before = files(tmp_path)
    where = Path(os.path.realpath(target))
    assert export_lora(adapted("linear")[0], target, rank=2) == Path(target)
    added = {(where / name).relative_to(tmp_path).as_posix() for name in NAMES}
    assert files(tmp_path) == before | added
    assert not [path for path in tmp_path.rglob(".*")]  # nothing of the making is left
    assert export_lora(adapted("linear")[0], target, rank=4) == Path(target)  # a stock adapter may be replaced
    assert json.loads((where / "adapter_config.json").read_text())["r"] == 4


def test_a_place_that_cannot_be_written_is_named_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("linear")[0]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    (tmp_path / "odd" / "adapter_config.json").mkdir(parents=True)
    for target, error, words in [
        ("file", FileExistsError, "is a file; pass a folder"),
        ("file/", FileExistsError, "is a file; pass a folder"),
        ("file/below", NotADirectoryError, "file is a file, so there can be no folder in it"),
        ("round", FileExistsError, "is a link to itself"),
        ("odd", FileExistsError, "has a folder named adapter_config.json"),
    ]:
        before = files(tmp_path)
        with pytest.raises(error, match=words):
            export_lora(model, f"{tmp_path}/{target}", rank=2)
        assert files(tmp_path) == before
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    with pytest.raises(PermissionError, match="nothing can be written in"):
        export_lora(model, tmp_path / "locked", rank=2)
    assert not (tmp_path / "locked").exists()
