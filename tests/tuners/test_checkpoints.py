"""Saved adapters that do not fit, adapters with odd names, numbers of numpy: nothing is half-loaded or half-saved."""

import importlib
import json
import random
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_dynamic import DyLoRAConfig, export_lora, hotswap_adapter
from peft_dynamic.tuners.checkpoint import adapter_tensors
from tests import methods
from tests.cli.test_export import damaged, mutated
from tests.conformance.cases import perturb
from tests.stock_cases import build
from tests.tuners.common import adapted, rows, tiny_llama
from tests.tuners.methods import METHODS, with_method

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix:UserWarning")

# Names that stand in paths too, or begin like one.
NAMES = [
    "0",
    "1",
    "model",
    "layers",
    "q_proj",
    "self_attn",
    "lora_A",
    "base_layer",
    "default2",
    "lora",
    "a b",
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows(2)).logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_may_have_any_name(method: str, name: str, tmp_path: Path) -> None:
    first = with_method(method)
    perturb(first, seed=1)
    expected = logits(first)
    first.save_pretrained(tmp_path / "first")
    model = with_method(method)
    perturb(model, seed=2)
    other = logits(model)
    model.load_adapter(tmp_path / "first", adapter_name=name)
    torch.testing.assert_close(logits(model), other)
    model.set_adapter(name)
    torch.testing.assert_close(logits(model), expected)
    if hasattr(model, "set_rank"):
        model.set_rank(2, name)
        first.set_rank(2)
        expected = logits(first)
        assert (model.get_rank(name), model.get_rank("default")) == (2, 8)
        torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "again", selected_adapters=[name])
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again" / name, adapter_name=name)
    if hasattr(model, "set_rank"):
        fresh.set_rank(2)
    torch.testing.assert_close(logits(fresh), expected)
    if method != "loretta-adp":
        export_lora(model, tmp_path / "lora", adapter_name=name)
        stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
        torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter(name)
    torch.testing.assert_close(logits(model), other)


@pytest.mark.parametrize("method", METHODS)
def test_the_tensors_of_an_adapter_are_those_that_peft_saves(method: str) -> None:
    model = with_method(method)
    saved = {name.replace(".weight", "") for name in adapter_tensors(model, "default")}
    trained = {name.replace(".weight", "") for name, p in model.named_parameters() if p.requires_grad}
    assert trained - {name for name in trained if "modules_to_save" in name} <= saved


def files_of(method: str, folder: Path) -> dict[str, torch.Tensor]:
    model = with_method(method)
    perturb(model)
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def own(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in tensors if ".lora_" in name or ".loretta_" in name]


DAMAGES = {
    "all of the adapter's tensors": lambda tensors: [tensors.pop(name) for name in own(tensors)],
    "one tensor": lambda tensors: tensors.pop(own(tensors)[-1]),
    "NaN": lambda tensors: tensors[own(tensors)[-1]].view(-1)[:1].fill_(float("nan")),
    "inf": lambda tensors: tensors[own(tensors)[-1]].view(-1)[:1].fill_(float("inf")),
    "a shape": lambda tensors: tensors.update({own(tensors)[0]: torch.zeros(3, 5)}),
    "a weight of the base model": lambda tensors: tensors.update(
        {"base_model.model.model.layers.0.mlp.gate_proj.base_layer.weight": torch.zeros(48, 32)}
        if any("gate_proj" in name for name in tensors)
        else {"base_model.model.model.layers.0.input_layernorm.weight": torch.zeros(32)}
    ),
}
REFUSED = "lacks .* of its|has NaN or infinite values|of shape|is none of the adapter's tensors"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_file_is_refused_and_nothing_of_it_is_loaded(method: str, damage: str, tmp_path: Path) -> None:
    tensors = files_of(method, tmp_path)
    DAMAGES[damage](tensors)
    if damage.startswith("a weight") and method.startswith("loretta"):
        return  # whose layer norms are its own; the next test has another weight
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=REFUSED):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    model = with_method(method)
    perturb(model, seed=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=REFUSED):
        model.load_adapter(tmp_path, adapter_name="default")
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("damage", [*DAMAGES, "an embedding"])
@pytest.mark.parametrize("method", ["dylora", "dylora-frozen", "dylora-mixer"])
def test_a_hot_swap_of_a_damaged_file_changes_nothing(method: str, damage: str, tmp_path: Path) -> None:
    tensors = files_of(method, tmp_path)
    if damage == "an embedding":
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(64, 32)
    else:
        DAMAGES[damage](tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = with_method(method)
    perturb(model, seed=5)
    model.set_rank(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    with pytest.raises(ValueError, match=f"cannot swap|{REFUSED}"):
        hotswap_adapter(model, tmp_path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.get_rank() == 2
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("name", ["model", "layers", "0", "self_attn"])
def test_a_weight_of_the_base_model_is_seen_whatever_the_adapters_name(name: str, tmp_path: Path) -> None:
    tensors = files_of("dylora", tmp_path)
    tensors["base_model.model.model.layers.0.input_layernorm.weight"] = torch.zeros(32)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is none of the adapter's tensors"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name=name)


def test_resized_embeddings_may_come_along(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)).isfinite().all()


OF_A_LORA: dict[str, Any] = {
    "lora_alpha": np.float32(16),
    "lora_dropout": np.float64(0.1),
    "rank_pattern": {"layers.0.self_attn.q_proj": np.int16(2)},
    "alpha_pattern": {"layers.0.self_attn.q_proj": np.float16(8)},
    "layers_to_transform": [np.int64(0), np.int64(1)],
}
OF_ITS_OWN: dict[str, dict[str, Any]] = {
    "dylora": {
        "ranks": [np.int64(1), np.int32(4)],
        "rank_seed": np.int64(3),
        "geometric_p": np.float32(0.5),
        "rank_sampling": [np.float32(1), np.int64(2)],
    },
    "loretta-rep": {"bottleneck": np.int64(4), "tensor_rank": np.int32(2)},
    "loretta-adp": {"bottleneck": np.int64(4), "tensor_rank": np.int64(2), "scaling": np.float32(2.0)},
}


@pytest.mark.parametrize("method", methods.configs())
def test_numbers_of_numpy_are_saved_as_numbers(method: str, tmp_path: Path) -> None:
    config = methods.configs(["q_proj"])[method]()
    given = OF_ITS_OWN.get(method, {}) | (OF_A_LORA if isinstance(config, LoraConfig) else {})
    if "bottleneck" not in given:
        given = {"r": np.int64(4), **given}
    config = methods.configs(["q_proj"])[method](**given)
    json.dumps(config.to_dict(), default=list)
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model))


def test_ranks_of_numpy_and_what_is_no_rank() -> None:
    model = adapted()
    model.set_rank(np.int64(2))
    assert (model.get_rank(), type(model.get_rank())) == (2, int)
    with model.at_rank({"q_proj": np.int32(1)}):
        pass
    for wrong in (True, np.bool_(True), 2.0, np.float64(2), "2", None, [2]):
        with pytest.raises(TypeError, match="rank must be an int"):
            model.set_rank(wrong)
    assert model.get_rank() == 2


# Any other is an error of the insides.
OF_A_USER = (ValueError, TypeError, OSError, SafetensorError)


def changed(tensors: dict[str, torch.Tensor], chance: random.Random) -> dict[str, torch.Tensor]:
    """The same with one tensor missing, misshapen, of another kind, renamed, not a number, or one too many."""
    name = chance.choice(sorted(tensors))
    kind = chance.randrange(6)
    if kind == 0:
        return {key: value for key, value in tensors.items() if key != name}
    if kind == 1:
        return tensors | {name: torch.zeros(chance.choice([(0,), (1,), (3, 5), (2, 2, 2)]))}
    if kind == 2:
        return tensors | {name: tensors[name].to(chance.choice([torch.int8, torch.bool, torch.int64]))}
    if kind == 3:
        return {f"{key}x" if key == name else key: value for key, value in tensors.items()}
    if kind == 4:
        odd = chance.choice(["x", "lora_A", "model.layers.0", "model.layers.0.self_attn.q_proj.weight"])
        return tensors | {f"base_model.model.{odd}": torch.zeros(2, 2)}
    return tensors | {name: torch.full_like(tensors[name], float("nan"))}


@pytest.mark.hypothesis  # for the row of fresh examples
@pytest.mark.filterwarnings("ignore")  # what hosts say of such files
@pytest.mark.parametrize("whole", [[], ["lm_head"]])
@pytest.mark.parametrize("method", METHODS)
def test_no_damage_is_loaded_in_part_or_gives_an_error_of_the_insides(
    method: str, whole: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A thousand under `make test-matrix`. What PEFT itself cannot read has PEFT's, json's or safetensors' error."""
    settings = METHODS[method]()
    settings.modules_to_save = whole or None
    model = get_peft_model(tiny_llama(), settings)
    perturb(model)
    model.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    many = request.config.getoption("--hypothesis-profile") == "fresh"
    chances = random.Random(f"{method}/{bool(whole)}" if not many else None)
    target = get_peft_model(tiny_llama(), settings)
    perturb(target, seed=5)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    for number in range(80 if many else 16):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        seed = chances.randrange(2**32)
        if number % 4 == 0:
            damaged(folder / "adapter_model.safetensors", seed)
        elif number % 4 == 1:
            damaged(folder / "adapter_config.json", seed)
        elif number % 4 == 2:
            odd = mutated({key: value for key, value in config.items() if key != "peft_type"}, seed)
            (folder / "adapter_config.json").write_text(json.dumps({**odd, "peft_type": config["peft_type"]}))
        else:
            file = folder / "adapter_model.safetensors"
            save_file(changed(tensors, random.Random(seed)), file, metadata={"format": "pt"})
        with suppress(*OF_A_USER):
            PeftModel.from_pretrained(tiny_llama(), folder)
        try:
            target.load_adapter(folder, adapter_name="default")
        except OF_A_USER:
            after = target.state_dict()
            assert all(torch.equal(after[name], value) for name, value in before.items()), seed
        else:
            target.load_state_dict(before)


@pytest.mark.parametrize("load", ["from_pretrained", "peft", "peft.utils"])
def test_a_missing_module_is_named_for_our_adapters_alone(load: str, tmp_path: Path) -> None:
    for config, kind in ((METHODS["dylora"](), ValueError), (LoraConfig(r=2, target_modules=["q_proj"]), KeyError)):
        config.modules_to_save = ["lm_head"]
        folder = tmp_path / kind.__name__
        model = get_peft_model(tiny_llama(), config)
        model.save_pretrained(folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors = {name: value for name, value in tensors.items() if "lm_head" not in name}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        loading = partial(PeftModel.from_pretrained, tiny_llama(), folder)
        if load != "from_pretrained":
            loading = partial(importlib.import_module(load).set_peft_model_state_dict, model, tensors)
        with pytest.raises(kind, match="lm_head"):
            loading()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_loaded_and_told_where_the_configuration_has_none(bias: str) -> None:
    """PEFT's own tests load such a checkpoint, made with a bias, into an adapter whose configuration says none."""
    model = get_peft_model(build("linear")[0], DyLoRAConfig(r=2, target_modules=["a"], bias=bias))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(1.23)
    state = get_peft_model_state_dict(model)
    assert any(name.endswith(".bias") for name in state)
    other = get_peft_model(build("linear")[0], DyLoRAConfig(r=2, target_modules=["a"]))
    with pytest.warns(UserWarning, match="has trained biases of the model .* says bias='none'"):
        set_peft_model_state_dict(other, state)
    loaded = other.base_model.model.a.base_layer.bias
    assert torch.equal(loaded, torch.full_like(loaded, 1.23))
