"""Ranks by module, refusals that leave no trace, broken checkpoints, and PEFT's less common operations."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_dynamic import DyLoRAConfig, MoSLoRAConfig
from peft_dynamic.tuners.dylora import get_rank, hotswap_adapter, set_rank
from tests.conformance.cases import perturb
from tests.stock_cases import Mlp
from tests.tuners.common import a_layer, adapted, rows, tiny_llama, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
]
IDS = torch.arange(6)


def mlp(**settings: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"r": 8, "ranks": [1, 2, 4, 8], "target_modules": ["a", "b"]}
    model = get_peft_model(Mlp(), DyLoRAConfig(**(defaults | settings)))
    perturb(model)
    return model.eval()


def test_ranks_by_module_name_and_pattern() -> None:
    model = adapted()
    model.set_rank({"q_proj": 2, "layers.1.mlp.up_proj": 4, r".*\.k_proj": 1})
    ranks = model.get_rank()
    assert {rank for name, rank in ranks.items() if name.endswith("q_proj")} == {2}
    assert {rank for name, rank in ranks.items() if name.endswith("k_proj")} == {1}
    assert ranks["model.layers.1.mlp.up_proj"] == 4
    assert ranks["model.layers.0.mlp.up_proj"] == 8
    with model.at_rank(4):
        assert model.get_rank() == 4
    assert model.get_rank() == ranks
    with pytest.raises(RuntimeError, match="inside"), model.at_rank(1):
        raise RuntimeError("inside")
    assert model.get_rank() == ranks


@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (0, ValueError, "outside 1..8"),
        (9, ValueError, "outside 1..8"),
        (True, TypeError, "must be an int"),
        ("4", TypeError, "must be an int"),
        (2.0, TypeError, "must be an int"),
        ({"a": 2, "nowhere": 2}, ValueError, "'nowhere'. match no module"),
        ({"a": 2, "b": 9}, ValueError, "rank=9 for 'b'"),
    ],
)
def test_a_bad_rank_changes_nothing(rank: Any, error: type, message: str) -> None:
    model = mlp()
    model.set_rank(4)
    with pytest.raises(error, match=message):
        model.set_rank(rank)
    assert model.get_rank() == 4


def test_a_rank_outside_the_trained_list_warns_once() -> None:
    model = mlp(rank_sampling="mostly_full")
    with pytest.warns(UserWarning, match=r"rank 3 is not one of the trained ranks \[1, 2, 4, 8\]"):
        model.set_rank(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_rank(4)
        model.set_rank(3)


def test_no_rank_is_trained_more_than_another_by_default() -> None:
    model = mlp()
    assert model.peft_config["default"].rank_sampling == "full"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_rank(3)
    assert mlp(truncation="prefix").peft_config["default"].rank_sampling == "mostly_full"


def test_rank_pattern_caps_a_module() -> None:
    model = mlp(rank_pattern={"b": 2})
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_views")}
    model.set_rank(4)
    assert [layer.r["default"] for layer in layers.values()] == [4, 2]
    assert model.get_rank() == 4
    model.set_rank(1)
    assert [layer.r["default"] for layer in layers.values()] == [1, 1]
    with pytest.raises(ValueError, match=r"rank=4 for .* is outside 1..2"):
        model.set_rank({"b": 4})


def test_ranks_without_an_adapter() -> None:
    with pytest.raises(ValueError, match="has no DyLoRA adapter"):
        set_rank(Mlp(), 2)
    with pytest.raises(ValueError, match="has no DyLoRA adapter"):
        get_rank(get_peft_model(Mlp(), MoSLoRAConfig(target_modules=["a"])))


class OddLinear(nn.Linear):
    """A layer for which a user brings a LoRA layer of another build."""


class OddLora(nn.Module, LoraLayer):
    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, kwargs["r"], lora_alpha=kwargs["lora_alpha"], config=config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha, **kwargs)
        self.lora_A[adapter_name] = nn.Sequential(self.lora_A[adapter_name])


def test_a_refused_layer_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    base = Mlp()
    base.head = OddLinear(16, 5)
    expected, before = base(IDS), [type(module) for module in base.modules()]
    config = DyLoRAConfig(r=4, target_modules=["a", "head"])
    config._register_custom_module({OddLinear: OddLora})
    with pytest.raises(ValueError, match=r"does not support OddLora.*Sequential"):
        get_peft_model(base, config)
    assert [type(module) for module in base.modules()] == before
    assert torch.equal(base(IDS), expected)
    assert not base._forward_pre_hooks
    get_peft_model(base, DyLoRAConfig(r=4, target_modules=["a"]))  # and it can be used


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
def test_a_grouped_convolution_needs_divisible_ranks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.conv = nn.Linear(4, 4), nn.Conv2d(8, 8, 3, groups=2)

    net = Net()
    with pytest.raises(ValueError, match=r"cannot use the ranks \[1\] on Conv2d with groups=2"):
        get_peft_model(net, DyLoRAConfig(r=4, ranks=[1, 2, 4], target_modules=["lin", "conv"]))
    assert type(net.lin) is nn.Linear


def test_a_second_adapter_that_is_refused_leaves_the_first() -> None:
    model = mlp()
    expected = model(IDS)
    model.base_model.model.head = OddLinear(16, 5)
    model.base_model.model.head.requires_grad_(False)
    expected = model(IDS)
    config = DyLoRAConfig(r=4, target_modules=["a", "head"])
    config._register_custom_module({OddLinear: OddLora})
    with pytest.raises(ValueError, match="does not support OddLora"):
        model.add_adapter("second", config)
    assert torch.equal(model(IDS), expected)


def saved(folder: Path) -> Path:
    mlp().save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def break_file(path: Path, how: str) -> None:
    tensors = load_file(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "no header":
        path.write_bytes(b"\x00" * 100)
    elif how == "a tensor missing":
        save_file({k: v for k, v in tensors.items() if "a.lora_B" not in k}, path)
    elif how == "another rank":
        save_file({k: (v[:4].clone() if "lora_A" in k else v) for k, v in tensors.items()}, path)


@pytest.mark.parametrize("how", ["truncated", "no header", "a tensor missing", "another rank"])
def test_a_broken_checkpoint_is_an_error_and_nothing_is_loaded(tmp_path: Path, how: str) -> None:
    break_file(saved(tmp_path), how)
    torch.manual_seed(0)
    base = Mlp()
    expected = base(IDS)
    with pytest.raises(Exception, match=r"(incomplete|Incomplete|header|lacks 1 of its 4 tensors|of shape \(4, 16\))"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(base(IDS), expected)
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Exception, match=r"(incomplete|Incomplete|header|lacks 1 of its 4 tensors|of shape \(4, 16\))"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"peft_type": "NYLORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(KeyError, match="NYLORA"):
        PeftModel.from_pretrained(Mlp(), tmp_path)


def test_auto_classes_load_an_adapter(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, DyLoRAConfig(r=8, ranks=[1, 8], target_modules=["q_proj"], task_type="CAUSAL_LM"))
    perturb(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        for rank in (1, 8):
            set_rank(model, rank)
            set_rank(loaded, rank)
            assert torch.equal(loaded.eval()(input_ids=rows(2)).logits, model(input_ids=rows(2)).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_into_low_memory(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = mlp()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for rank in (1, 8):
        with model.at_rank(rank), loaded.at_rank(rank):
            assert torch.equal(loaded(IDS), model(IDS))


@pytest.mark.parametrize("combination", ["svd", "linear", "cat", "ties"])
def test_weighted_adapters_combine_the_set_ranks(combination: str) -> None:
    model = mlp()
    model.add_adapter("other", DyLoRAConfig(r=8, ranks=[1, 2, 4, 8], target_modules=["a", "b"], lora_alpha=32))
    model.set_adapter("other")
    perturb(model, seed=2)
    model.set_rank(2, adapter_name="default")
    model.set_rank(2 if combination in ("linear", "ties") else 4, adapter_name="other")
    expected = {
        name: 0.5 * layer.get_delta_weight("default") + 0.25 * layer.get_delta_weight("other")
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_views")
    }
    kwargs = {"density": 0.9} if combination == "ties" else {}
    model.add_weighted_adapter(
        ["default", "other"], [0.5, 0.25], "mix", combination_type=combination, svd_rank=6, **kwargs
    )
    rank = {"svd": 6, "linear": 2, "cat": 6, "ties": 2}[combination]
    assert model.peft_config["mix"].r == rank
    assert (model.get_rank("default"), model.peft_config["default"].r) == (2, 8)
    for name, delta in expected.items():
        mixed = model.get_submodule(name).get_delta_weight("mix")
        assert torch.isfinite(mixed).all()
        if combination in ("svd", "cat"):
            assert torch.allclose(mixed, delta, atol=1e-5)
        assert torch.linalg.matrix_rank(mixed) <= rank


@pytest.mark.parametrize("rank", [1, 8])
def test_hot_swapping_at_a_set_rank(tmp_path: Path, rank: int) -> None:
    other = mlp(lora_alpha=24)
    perturb(other, seed=5)
    other.save_pretrained(tmp_path)
    model = mlp()
    model.set_rank(rank)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    hotswap_adapter(model, tmp_path)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert model.get_rank() == rank
    with other.at_rank(rank):
        assert torch.allclose(model(IDS), other(IDS), atol=1e-6)
    with model.at_rank(4), other.at_rank(4):
        assert torch.allclose(model(IDS), other(IDS), atol=1e-6)


def test_hot_swapping_refuses_what_does_not_fit(tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter as stock_hotswap

    mlp(scaling="alpha/b").save_pretrained(tmp_path / "scaling")
    mlp(r=4, ranks=None).save_pretrained(tmp_path / "r")
    get_peft_model(Mlp(), LoraConfig(target_modules=["a", "b"])).save_pretrained(tmp_path / "lora")
    model = mlp()
    expected = model(IDS)
    for name, message in (
        ("scaling", "scaling='alpha/b' instead of"),
        ("r", "r=4 instead of 8"),
        ("lora", "LoraConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            hotswap_adapter(model, tmp_path / name)
    mlp().save_pretrained(tmp_path / "same")
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but DYLORA was passed"):
        stock_hotswap(model, tmp_path / "same", "default")
    assert torch.equal(model(IDS), expected)


def test_padding_for_compiled_hotswap_is_noticed() -> None:
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = mlp()
    model.set_rank(4)
    expected = model(IDS)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert torch.allclose(model(IDS), expected, atol=1e-6)
    with pytest.raises(ValueError, match="factors of the adapter 'default' were replaced"):
        model.set_rank(2)


def test_replicated_layers_have_adapters_of_their_own() -> None:
    model = adapted(layer_replication=[[0, 2], [0, 2]])
    assert len(model.base_model.model.model.layers) == 4
    train(model, steps=4)
    model.eval()
    outputs = []
    for rank in (1, 8):
        model.set_rank(rank)
        outputs.append(model(input_ids=rows(2)).logits)
    assert not torch.allclose(*outputs, atol=1e-4)


def test_tied_embeddings_stay_tied_at_every_rank() -> None:
    base = tiny_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = DyLoRAConfig(
        r=8, ranks=[1, 8], target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    perturb(model)
    for rank in (1, 8):
        model.set_rank(rank)
        assert torch.allclose(embedding.get_delta_weight("default"), head.get_delta_weight("default"), atol=1e-5)


def test_safetensors_only(tmp_path: Path) -> None:
    mlp().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_inference_cuts_once_and_sees_new_weights() -> None:
    model = mlp()
    model.set_rank(2)
    layer = a_layer(model)
    with torch.no_grad():
        assert layer.lora_A["default"].weight is layer.lora_A["default"].weight
        first = model(IDS)
        layer.lora_B["default"]._parameters["weight"].mul_(2)
        second = model(IDS)
        layer.lora_B["default"]._parameters["weight"].data.mul_(2)  # unseen by torch's version counter, until
        model.set_rank(2)
        third = model(IDS)
    assert not torch.allclose(first, second, atol=1e-3)
    assert not torch.allclose(second, third, atol=1e-3)


def test_a_model_that_moves_to_another_dtype_is_cut_again() -> None:
    model = mlp()
    model.set_rank(2)
    with torch.no_grad():
        single = model(IDS)
        double = model.double()(IDS)
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-5)
