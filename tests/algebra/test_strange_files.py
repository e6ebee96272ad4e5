"""Adapters as strangers have them: chosen modules, odd files, and what two of them may not be added up for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_dynamic import at_rank, average_adapters, export_lora, merge_adapters, resize_adapter, set_rank
from peft_dynamic.algebra.checkpoint import read_checkpoint
from tests.algebra.test_adapters import deltas, logits, saved
from tests.conformance.cases import perturb
from tests.tuners.common import tiny_llama

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def with_config(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


CHOSEN: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    "expression": {"target_modules": r".*\.0\..*(q|v)_proj"},
}


@pytest.mark.parametrize("how", CHOSEN)
def test_however_its_modules_were_chosen_it_is_a_product(how: str, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", **CHOSEN[how])
    resize_adapter(whole, tmp_path / "same", rank=8)
    assert torch.equal(logits(tmp_path / "same"), logits(whole))
    merge_adapters({str(whole): 1.0}, tmp_path / "sum")
    updates = deltas(whole)
    torch.testing.assert_close(deltas(tmp_path / "sum"), updates, atol=1e-5, rtol=1e-5)
    model = PeftModel.from_pretrained(tiny_llama(), whole)
    with at_rank(model, 2):
        export_lora(model, tmp_path / "export")
    resize_adapter(whole, tmp_path / "small", rank=2)
    small = deltas(tmp_path / "small")
    assert small.keys() == updates.keys()
    torch.testing.assert_close(deltas(tmp_path / "export"), small, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": "8"}, "r must be an int of at least 1, got '8'"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number, got None"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern must be a dict .*got \['q_proj'\]"),
        ({"rank_pattern": {"[": 4}}, "rank_pattern must be a dict"),
        ({"alpha_pattern": {"q_proj": "5"}}, "alpha_pattern must be a dict from names to finite numbers"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a text"),
        ({"target_parameters": 5}, "target_parameters must be a list of names"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    whole = with_config(saved(tmp_path / "whole", target_modules=["q_proj"]), **fields)
    with pytest.raises(ValueError, match=f"whole': adapter_config.json does not make a configuration .*{message}"):
        resize_adapter(whole, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_an_alpha_below_0_turns_the_update_around(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", target_modules=["q_proj"])
    resize_adapter(whole, tmp_path / "small", rank=2)
    resize_adapter(with_config(whole, lora_alpha=-12), tmp_path / "turned", rank=2)
    found, wanted = deltas(tmp_path / "turned"), deltas(tmp_path / "small")
    torch.testing.assert_close(found, {name: -value for name, value in wanted.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {k: v for k, v in x.items() if k != f"{Q}.lora_A.weight"}, "q_proj.lora_B.weight and no A beside"),
        (lambda x: x | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, "lora_magnitude_vector, which is more than a"),
        (lambda x: x | {f"{Q}.lora_B.bias": torch.ones(32)}, "lora_B.bias, which is more than a product"),
        (lambda x: {k: v.to(torch.float8_e4m3fn) for k, v in x.items()}, "has factors of torch.float8_e4m3fn"),
        (lambda x: {k: v.to(torch.int8) for k, v in x.items()}, "has factors of torch.int8"),
    ],
)
def test_tensors_that_are_no_pair_of_factors_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    whole = with_tensors(saved(tmp_path / "whole", target_modules=["q_proj"]), change)
    with pytest.raises(ValueError, match=message):
        resize_adapter(whole, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_one_adapter_alone_does_not_lose_what_it_trained_whole(tmp_path: Path) -> None:
    for name, settings in (("head", {"modules_to_save": ["lm_head"]}), ("tokens", {"trainable_token_indices": [1, 2]})):
        whole = saved(tmp_path / name, target_modules=["q_proj"], **settings)
        with pytest.raises(ValueError, match=r"trained modules, biases or tokens .* or cut one adapter with resize"):
            merge_adapters({str(whole): 1.0}, tmp_path / "out")
        resize_adapter(whole, tmp_path / f"{name}-same", rank=8)
        assert torch.equal(logits(tmp_path / f"{name}-same"), logits(whole))
    assert not (tmp_path / "out").exists()


def test_one_without_a_base_model_does_not_hide_that_the_others_have_two(tmp_path: Path) -> None:
    bases = {"none": None, "first": "base/first", "second": "base/second"}
    made = [
        with_config(saved(tmp_path / name, target_modules=["q_proj"]), base_model_name_or_path=base)
        for name, base in bases.items()
    ]
    with pytest.raises(ValueError, match=r"is of the base model 'base/second', and .* of 'base/first'"):
        average_adapters(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    average_adapters(made[:2], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base/first"


def test_a_sum_has_the_wider_floats(tmp_path: Path) -> None:
    short = with_tensors(
        saved(tmp_path / "short", 1, target_modules=["q_proj"]), lambda x: {k: v.half() for k, v in x.items()}
    )
    wide = saved(tmp_path / "wide", 2, target_modules=["q_proj"])
    merge_adapters({str(short): 1.0, str(wide): 1.0}, tmp_path / "sum")
    one, other = deltas(short), deltas(wide)
    torch.testing.assert_close(deltas(tmp_path / "sum"), {k: one[k] + other[k] for k in one}, atol=1e-5, rtol=1e-5)


def test_what_is_too_large_for_its_floats_is_not_written(tmp_path: Path) -> None:
    short = with_tensors(
        saved(tmp_path / "short", target_modules=["q_proj"]), lambda x: {k: v.half() for k, v in x.items()}
    )
    with pytest.raises(ValueError, match=r"lora_B.weight would be too large for torch.float16"):
        merge_adapters({str(short): 1e6}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_grown_embedding_stays_when_its_adapter_is_left_out(tmp_path: Path) -> None:
    def grown() -> Any:
        model = tiny_llama()
        torch.manual_seed(0)
        model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 3, mean_resizing=False)
        return model

    base = grown()
    with torch.no_grad():
        base.get_input_embeddings().weight[-3:] = 5.0
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    perturb(model)
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    resize_adapter(tmp_path / "whole", tmp_path / "small", rank={"embed_tokens": 0})
    loaded = PeftModel.from_pretrained(grown(), tmp_path / "small")
    assert (loaded.get_input_embeddings().weight[-3:] == 5.0).all()


@pytest.mark.parametrize("pattern", ["[", 1])
def test_a_pattern_that_is_no_expression_is_named(pattern: Any, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", target_modules=["q_proj"])
    model = PeftModel.from_pretrained(tiny_llama(), whole)
    calls: list[Callable[[], Any]] = [
        lambda: resize_adapter(whole, tmp_path / "out", rank={pattern: 2}),
        lambda: export_lora(model, tmp_path / "out", rank={pattern: 2}),
        lambda: set_rank(model, {pattern: 2}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"the key .* must be the end of a module's name or a regular expression"):
            call()
    assert not (tmp_path / "out").exists()


def test_what_is_no_path_is_named(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", target_modules=["q_proj"])
    model = PeftModel.from_pretrained(tiny_llama(), whole)
    nothing: Any = None  # what a user may pass
    numbers: Any = [1, 2]
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("adapter=None: must be a path", lambda: resize_adapter(nothing, tmp_path / "out", rank=2)),
        ("out=None: must be a path", lambda: resize_adapter(whole, nothing, rank=2)),
        ("adapter=1: must be a path", lambda: average_adapters(numbers, tmp_path / "out")),
        ("save_directory=None: must be a path", lambda: export_lora(model, nothing)),
        ("save_directory='': must be a folder", lambda: export_lora(model, "")),
        ("out='': must be a folder", lambda: resize_adapter(whole, "", rank=2)),
    ]
    for message, call in calls:
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_numpy_s_short_floats_are_shares(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    whole = saved(tmp_path / "whole", target_modules=["q_proj"])
    resize_adapter(whole, tmp_path / "half", parameters=numpy.float32(0.5))
    assert read_checkpoint(tmp_path / "half").size == read_checkpoint(whole).size // 2
    with pytest.raises(ValueError, match="parameters=1e-09: no module would be left"):
        resize_adapter(whole, tmp_path / "out", parameters=1e-9)


def test_a_loaded_adapter_is_resized_without_a_change_of_mode(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)).train()
    model.base_model.model.lm_head.eval()
    resize_adapter(model, "small", rank=2)
    assert [name for name, module in model.named_modules() if not module.training] == ["base_model.model.lm_head"]
    assert model.active_adapter == "default"


@pytest.mark.parametrize("name", ["v1.4", ""])
def test_a_name_that_no_adapter_can_have_leaves_the_model_as_it_was(name: str) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"out=.*: must be the name of a new adapter of the model, without a dot"):
        resize_adapter(model, name, rank=2)
    assert [*model.peft_config] == ["default"]


def test_models_that_cannot_hold_a_second_adapter_say_what_to_do() -> None:
    mixed = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]), mixed=True)
    for model in (mixed, tiny_llama()):
        with pytest.raises(TypeError, match=r"must be a folder or a PeftModel, got a .*export_lora"):
            resize_adapter(model, "small", rank=2)
    biased = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only"))
    with pytest.raises(ValueError, match="has bias='lora_only', and a PeftModel holds one adapter with trained biases"):
        resize_adapter(biased, "small", rank=2)


def test_what_another_program_wrote_into_a_configuration_is_told(tmp_path: Path) -> None:
    whole = with_config(saved(tmp_path / "whole", target_modules=["q_proj"]), use_newest=True, use_newer=False)
    with pytest.warns(UserWarning, match="use_newest") as told:
        read_checkpoint(whole)
    ours = [str(each.message) for each in told if each.filename.endswith("checkpoint.py")]
    assert len(ours) == 1
    assert "adapter_config.json has use_newest, of a newer PEFT or another program" in ours[0]


def test_a_readme_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", target_modules=["q_proj"])
    model = PeftModel.from_pretrained(tiny_llama(), whole)
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("# My project")
    for call in (lambda: resize_adapter(whole, project, rank=2), lambda: export_lora(model, project)):
        with pytest.raises(FileExistsError, match=r"has a README.md and no adapter: it would be replaced"):
            call()
    assert (project / "README.md").read_text() == "# My project"
    assert len([*project.iterdir()]) == 1


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_write_leaves_what_was_there(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(tmp_path / "whole", target_modules=["q_proj"])
    out = tmp_path / "out"
    if there:
        resize_adapter(whole, out, rank=4)
    before = {path.name: path.read_bytes() for path in out.glob("*")}

    def full(*args: Any, **more: Any) -> None:
        raise OSError("no space left on device")

    for step in ("save_file", "write_model_card"):
        with monkeypatch.context() as patch:
            patch.setattr(f"peft_dynamic.algebra.checkpoint.{step}", full)
            for call in (
                lambda: resize_adapter(whole, out, rank=2),
                lambda: merge_adapters({str(whole): 0.5}, out),
                lambda: average_adapters([whole, whole], out),
            ):
                with pytest.raises(OSError, match="no space left"):
                    call()
        assert {path.name: path.read_bytes() for path in out.glob("*")} == before
        assert {path.name for path in tmp_path.iterdir()} == {"whole"} | ({"out"} if there else set())
