"""Files for engines that know one rank and one scale: read as they read them, they are the model's adapter."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_dynamic import DyLoRAConfig, LorettaRepConfig, MoSLoRAConfig, export_lora, resize_adapter
from tests import methods, vllm_loader
from tests.conformance.cases import CASES, perturb
from tests.conformance.test_conformance import compute
from tests.tuners.common import adapted, rows, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows(2)).logits


def linear_names(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}


LINEAR = linear_names(tiny_llama())  # all that vLLM adapts


def with_updates(updates: dict[str, vllm_loader.Update]) -> nn.Module:
    """The base model with what vLLM adds to its layers."""
    model = tiny_llama()
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight += update.scale * update.b @ update.a
    return model


def read_by(engine: str, folder: Path) -> nn.Module:
    """The base model with the file's updates, as the engine's rules say: the matrices, one alpha, no patterns.

    llama.cpp scales by lora_alpha over the rank of each matrix.
    """
    if engine == "vllm":
        return with_updates(vllm_loader.read(folder, LINEAR))
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    model = tiny_llama()
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                b = tensors[name.replace(".lora_A.", ".lora_B.")]
                scale = config["lora_alpha"] / a.shape[0]
                layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                layer.weight += scale * b @ a
    return model


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
RANKED = {"r": 8, "ranks": [1, 2, 4, 8], "lora_alpha": 16}
SETTINGS = methods.configs(
    "all-linear",
    variations=("dylora-paper", "loretta-rep-noise"),
    lora=True,
    own={
        "dylora": RANKED,
        "moslora": {"r": 8, **PATTERNS},
        "density-lora": {"r": 8, "rank_pattern": {"q_proj": 3}},
        "loretta-rep": {
            "train_layer_norms": False,
            "rank_pattern": {"q_proj": 2},
            "target_modules": ["q_proj", "v_proj"],
        },
        "loretta-rep-noise": {"rank_pattern": {}},
    },
    task_type="CAUSAL_LM",
)
SETTINGS |= {
    "dylora-patterns": partial(
        SETTINGS["dylora"],
        ranks=None,
        lora_alpha=8,
        rank_pattern={"q_proj": 2, "up_proj": 4},
        alpha_pattern={"v_proj": 3, "q_proj": 5},
        scaling="alpha/sqrt(b)",
    ),
    "moslora-rslora": partial(SETTINGS["moslora"], alpha_pattern={}, use_rslora=True),
}


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("method", SETTINGS)
def test_an_engine_without_patterns_computes_the_adapter(method: str, engine: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), SETTINGS[method]())
    perturb(model)
    if hasattr(model, "set_rank") and method != "dylora-patterns":
        model.set_rank({r".*layers\.0\..*": 2, r".*layers\.1\.mlp.*": 1} if method == "dylora" else 2)
    expected = logits(model)
    export_lora(model, tmp_path, engine=engine)
    torch.testing.assert_close(logits(read_by(engine, tmp_path)), expected, rtol=1e-4, atol=2e-5)
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    written = stock.peft_config["default"]
    assert (written.rank_pattern, written.alpha_pattern, written.use_rslora) == ({}, {}, False)
    torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=2e-5)


def test_without_it_such_an_engine_computes_something_else(tmp_path: Path) -> None:
    model = adapted(lora_alpha=16, scaling="alpha/b")
    perturb(model)
    expected = logits(model)
    model.set_rank({r".*layers\.0\..*": 2})
    expected = logits(model)
    export_lora(model, tmp_path)
    assert (logits(read_by("vllm", tmp_path)) - expected).abs().max() > 1e-2


def test_equal_scales_leave_the_factors_to_the_bit(tmp_path: Path) -> None:
    model = adapted()
    perturb(model)
    model.set_rank({r".*layers\.0\..*": 2})
    export_lora(model, tmp_path / "plain")
    export_lora(model, tmp_path / "uniform", uniform_rank=True)
    plain, uniform = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "uniform"))
    for name, tensor in plain.items():
        padded = uniform[name]
        assert padded.shape[0 if "lora_A" in name else 1] == 8
        assert torch.equal(padded[: tensor.shape[0], : tensor.shape[1]], tensor)
        assert padded.count_nonzero() == tensor.count_nonzero()


@pytest.mark.parametrize("name", ["dylora-linear", "dylora-embedding", "moslora-patterns", "dylora-transposed"])
def test_one_rank_for_layers_of_every_kind(name: str, tmp_path: Path) -> None:
    from tests.stock_cases import build

    case = next(case for case in CASES if case.name == name)
    model, inputs = case.perturbed()
    if case.ranked:
        layers = [key for key, layer in model.named_modules() if hasattr(layer, "lora_views")]
        model.set_rank({layers[0].removeprefix("base_model.model."): case.ranks[0]})
    expected = compute(model, inputs)
    export_lora(model, tmp_path, uniform_rank=True)
    stock = PeftModel.from_pretrained(build(case.layers)[0], tmp_path).eval()
    assert stock.peft_config["default"].rank_pattern == {}
    torch.testing.assert_close(compute(stock, inputs), expected, rtol=1e-4, atol=case.tolerance)


UNREADABLE: dict[str, tuple[Any, str]] = {
    "norms": (LorettaRepConfig(bottleneck=4, tensor_rank=2, target_modules=["q_proj"]), "train_layer_norms=False"),
    "modules_to_save": (DyLoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), "other tensors"),
    "bias": (DyLoRAConfig(r=4, target_modules=["q_proj"], bias="lora_only"), "bias='lora_only'"),
    "lora_bias": (MoSLoRAConfig(r=4, target_modules=["q_proj"], lora_bias=True), "lora_bias=True"),
    "dora": (MoSLoRAConfig(r=4, target_modules=["q_proj"], use_dora=True), "use_dora=True"),
    "embedding": (DyLoRAConfig(r=4, target_modules=["q_proj", "embed_tokens"]), "other tensors"),
    "tokens": (DyLoRAConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1]), "trainable_token_indices"),
    "replication": (
        DyLoRAConfig(r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]]),
        "layer_replication",
    ),
}


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_an_engine_would_drop_is_refused(kind: str, engine: str, tmp_path: Path) -> None:
    config, message = UNREADABLE[kind]
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match=f"engine='{engine}'.*{message}"):
        export_lora(model, tmp_path / "out", engine=engine)
    assert not (tmp_path / "out").exists()
    export_lora(model, tmp_path / "out")  # PEFT reads it
    assert type(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").peft_config["default"]) is LoraConfig


# The rest vLLM takes of some models, or reads as something else
REFUSED = {"norms": "modules_to_save", "modules_to_save": "modules_to_save", "bias": "a bias", "dora": "use_dora"}
REFUSED |= {"lora_bias": "no LoRA weight", "tokens": "no LoRA weight"}


@pytest.mark.parametrize("kind", REFUSED)
def test_vllms_own_checks_refuse_what_we_refuse_to_write(kind: str, tmp_path: Path) -> None:
    config = copy.deepcopy(UNREADABLE[kind][0])
    config.task_type = "CAUSAL_LM"
    export_lora(get_peft_model(tiny_llama(), config), tmp_path)
    with pytest.raises(vllm_loader.Refused, match=REFUSED[kind]):
        vllm_loader.read(tmp_path, LINEAR)


def test_vllm_is_to_be_started_with_the_rank(tmp_path: Path) -> None:
    export_lora(adapted(r=32, ranks=[32]), tmp_path, engine="vllm")
    with pytest.raises(vllm_loader.Refused, match="rank 32 is above max_lora_rank 16"):
        vllm_loader.read(tmp_path, LINEAR)
    assert vllm_loader.read(tmp_path, LINEAR, max_lora_rank=32)


@pytest.mark.parametrize("method", ["dylora", "moslora", "loretta-rep"])
def test_transformers_own_load_adapter_computes_the_adapter(method: str, tmp_path: Path) -> None:
    settings = {"train_layer_norms": True} if method == "loretta-rep" else {}
    model = get_peft_model(tiny_llama(), SETTINGS[method](**settings))
    perturb(model)
    expected = logits(model)
    export_lora(model, tmp_path)
    stock = tiny_llama()
    stock.load_adapter(tmp_path)
    torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=2e-5)


def test_transformers_own_load_adapter_takes_a_twin_by_its_folder(tmp_path: Path) -> None:
    model = adapted(hub_ranks=[1, 4])
    perturb(model)
    model.save_pretrained(tmp_path)
    for rank in (1, 4):
        stock = tiny_llama()
        stock.load_adapter(tmp_path, adapter_kwargs={"subfolder": f"rank-{rank}"})
        assert type(stock.peft_config["default"]) is LoraConfig
        with model.at_rank(rank):
            torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=2e-5)


def test_an_unknown_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine='tgi': must be one of peft, vllm, llama.cpp"):
        export_lora(adapted(), tmp_path / "out", engine="tgi")


def test_grouped_convolutions_cannot_be_padded(tmp_path: Path) -> None:
    model, _ = next(case for case in CASES if case.name == "dylora-convolutions").perturbed()
    with pytest.raises(ValueError, match="g2 is a grouped convolution"):
        export_lora(model, tmp_path / "out", uniform_rank=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_per_module_are_padded_to_the_largest(engine: str, rslora: bool, tmp_path: Path) -> None:
    settings = {"r": 8, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": rslora}
    model = get_peft_model(tiny_llama(), LoraConfig(**settings, alpha_pattern={"v_proj": 3}))
    perturb(model)
    model.save_pretrained(tmp_path / "whole")
    for name, arguments in {"peft": {}, "engine": {"engine": engine}}.items():
        resize_adapter(tmp_path / "whole", tmp_path / name, parameters=0.3, **arguments)
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft")
    made = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert made["rank_pattern"]
    layers = [module for module in stock.modules() if hasattr(module, "lora_A")]
    assert len(layers) < 14  # a module of rank 0 is in neither file
    padded = load_file(tmp_path / "engine" / "adapter_model.safetensors")
    assert len(padded) == 2 * len(layers)
    assert len({tensor.shape[0] for name, tensor in padded.items() if ".lora_A." in name}) == 1
    torch.testing.assert_close(logits(read_by(engine, tmp_path / "engine")), logits(stock), rtol=1e-4, atol=1e-4)


def test_a_resize_for_an_engine_is_refused_as_an_export_is(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj"], bias="all"))
    model.save_pretrained(tmp_path / "whole")
    for arguments, message in (({"engine": "vllm"}, "does not read bias"), ({"engine": "tgi"}, "engine='tgi'")):
        with pytest.raises(ValueError, match=message):
            resize_adapter(tmp_path / "whole", tmp_path / "out", rank=2, **arguments)
    with pytest.raises(ValueError, match="engine='vllm': must be 'peft' for an adapter in a model"):
        resize_adapter(model, "small", rank=2, engine="vllm")
    assert not (tmp_path / "out").exists()
