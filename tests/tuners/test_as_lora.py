"""What PEFT and its hosts do for `peft_type == LORA` alone: done for ours too, refused by name, or of no effect."""

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter
from peft.utils.save_and_load import get_peft_model_state_dict
from peft.utils.warning import PeftWarning
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peft_dynamic import DyLoRAConfig, export_lora
from peft_dynamic.methods import method_of
from tests import methods
from tests.tuners.methods import METHODS, with_method

# PEFT says so of each key that its own conversion puts in for a parameter: it looks among modules only.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

# Every place in a host's source that asks for PEFT's type LORA or for LoraConfig, and what it means for our methods.
PLACES = {
    "peft.mapping_func.get_peft_model": "a warning about EVA, which ours refuse",
    "peft.peft_model.PeftModel._get_peft_specific_model_tags": "the tag `lora` of a card; hub.py writes ours",
    "peft.peft_model.PeftModel.save_pretrained": "conversion of a changed start: refused, tested here",
    "peft.tuners.lora.config.LoraConfig.__post_init__": "sets the type, which ours set again",
    "peft.tuners.lora.conversion.convert_to_lora": "a warning only",
    "peft.tuners.lora.intruders.reduce_intruder_dimension": "refused by PEFT, tested here",
    "peft.tuners.mixed.model": "refused by PEFT, tested here",
    "peft.tuners.mixed.model.MixedModel._create_and_replace": "refused by PEFT, tested here",
    "peft.tuners.mixed.model.MixedModel._create_new_module": "refused by PEFT, tested here",
    "peft.tuners.tuners_utils._check_lora_target_modules_mamba": "done for ours, tested here",
    "peft.utils.hotswap": "refused by PEFT, tested here; peft_dynamic has a function of its own",
    "peft.utils.peft_types.PeftType": "the member",
    "peft.utils.save_and_load.get_peft_model_state_dict": "a warning of parts of a sharded model: done for ours",
    "peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers": "old checkpoints of "
    "experts as separate layers, of which ours have none",
    "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers": "done for ours, tested here",
    "transformers.integrations.peft.PeftAdapterMixin.load_adapter": "hot-swapping: refused by transformers",
    "trl.experimental.async_distillation.async_distillation_trainer.validate_lora_for_vllm_sync": "experimental",
    "trl.experimental.async_grpo.async_grpo_trainer.validate_lora_for_vllm_sync": "experimental",
    "trl.experimental.sdft.teacher_sync.is_pure_lora_training": "experimental",
    "trl.experimental.sdpo.teacher_sync.is_pure_lora_training": "experimental",
    "trl.trainer.dpo_trainer.DPOTrainer.__init__": "a warning for PEFT below 0.20",
    "trl.trainer.grpo_trainer.GRPOTrainer.__init__": "a warning for PEFT below 0.20",
    "trl.trainer.kto_trainer.KTOTrainer.__init__": "a warning for PEFT below 0.20",
    "trl.trainer.rloo_trainer.RLOOTrainer.__init__": "a warning for PEFT below 0.20",
}


def _asks_for_lora(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "LORA"
    if isinstance(node, ast.Constant):
        return node.value == "LORA"
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
        return _names(node.args[1], "LoraConfig")
    return isinstance(node, ast.Compare) and _names(node, "LoraConfig")


def _names(node: ast.AST, name: str) -> bool:
    return any(getattr(part, "id", getattr(part, "attr", "")) == name for part in ast.walk(node))


def _places(package: str) -> set[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root, found = Path(spec.origin).parent, set()

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{name}.{node.name}"
        if _asks_for_lora(node):
            found.add(name)
        for child in ast.iter_child_nodes(node):
            visit(child, name)

    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "LORA" in text or "LoraConfig" in text:
            visit(ast.parse(text), ".".join(path.relative_to(root.parent).with_suffix("").parts))
    return found


def test_the_hosts_special_cases_are_those_that_we_know() -> None:
    """Red by name when a release asks for LORA in a new place: read that place, then do, refuse or list it."""
    found = {place for package in ("peft", "transformers", "trl", "accelerate") for place in _places(package)}
    assert found == set(PLACES)


def qwen3(layers: int, **more: Any) -> Any:
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        **more,
    )
    return Qwen3MoeForCausalLM(config)


GATED = ["gate_proj", "up_proj", "down_proj"]
MOE: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "qwen3": (lambda: qwen3(2), GATED),
    "qwen3-with-dense-layers": (lambda: qwen3(3, mlp_only_layers=[1]), GATED),
    "mixtral": (
        lambda: MixtralForCausalLM(
            MixtralConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
            )
        ),
        ["w1", "w2", "w3"],
    ),
}
OURS = methods.configs(
    variations=["dylora-paper"], own={"density-lora": {"activation_modules": ["act_fn"], "include_padding": True}}
)


def _takes_parameters(name: str) -> bool:
    method = method_of(OURS[name]())
    return bool(method.engines) and "target_parameters" not in method.refused


LINEAR_ONLY = [name for name in OURS if not _takes_parameters(name)]
LIKE_LORA = [name for name in OURS if name not in LINEAR_ONLY]


def moe(name: str) -> Any:
    torch.manual_seed(0)
    return MOE[name][0]()


def targets(name: str, how: str) -> Any:
    experts = MOE[name][1]
    return {
        "list": ["q_proj", *experts],
        "experts": list(experts),
        "all-linear": "all-linear",
        "expression": rf".*\.({'|'.join(['q_proj', *experts])})$",
    }[how]


def adapted_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the LoRA factors alone: a mixer is MoSLoRA's own."""
    return {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if p.requires_grad and ("lora_A" in name or "lora_B" in name)
    }


@pytest.mark.parametrize("how", ["list", "experts", "all-linear", "expression"])
@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("method", LIKE_LORA)
def test_experts_are_adapted_as_stock_lora_adapts_them(method: str, name: str, how: str) -> None:
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": targets(name, how)}
    stock = get_peft_model(moe(name), LoraConfig(**settings))
    ours = get_peft_model(moe(name), OURS[method](**settings))
    assert adapted_shapes(ours) == adapted_shapes(stock)
    assert any(".experts." in key for key in adapted_shapes(ours))
    for (_, mine), (_, theirs) in zip(layers(ours), layers(stock), strict=True):
        assert mine.scaling == theirs.scaling
        assert mine.r == theirs.r


def layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("method", LIKE_LORA)
def test_an_adapter_of_experts_trains_is_saved_loaded_and_exported(method: str, name: str, tmp_path: Path) -> None:
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": targets(name, "list")}
    model = get_peft_model(moe(name), OURS[method](**settings))
    ids = torch.arange(12).view(2, 6)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        model.save_pretrained(tmp_path / "ours")
        again = PeftModel.from_pretrained(moe(name), tmp_path / "ours").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        export_lora(model, tmp_path / "stock")
        stock = PeftModel.from_pretrained(moe(name), tmp_path / "stock").eval()
        assert type(stock.peft_config["default"]) is LoraConfig
        torch.testing.assert_close(stock(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dylora", "dylora-paper"])
def test_a_fused_projection_has_two_ranks_for_each_of_the_adapter(method: str, tmp_path: Path) -> None:
    """At every rank, in evaluation and in the training step that draws it; exported, stock PEFT computes the same."""
    config = OURS[method](task_type="CAUSAL_LM", target_modules=targets("qwen3", "list"))
    model = get_peft_model(moe("qwen3"), config)
    fused = next(module for module in model.modules() if getattr(module, "parameter_name", "") == "gate_up_proj")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    outputs = []
    for rank in (1, 2, 4):
        model.eval().set_rank(rank)
        assert (model.get_rank(), fused.r["default"]) == (rank, 2 * rank)
        assert fused.lora_A["default"].weight.shape[0] == 4 * 2 * rank  # four experts
        with torch.no_grad():
            outputs.append(model(input_ids=ids).logits)
        export_lora(model, tmp_path / str(rank))
        stock = PeftModel.from_pretrained(moe("qwen3"), tmp_path / str(rank)).eval()
        with torch.no_grad():
            torch.testing.assert_close(stock(input_ids=ids).logits, outputs[-1], rtol=1e-5, atol=1e-5)
            schedule = fused.lora_views["default"].schedule
            schedule.refresh()
            schedule.drawn = rank
        model.set_rank(4)
        trained = model.train()(input_ids=ids).logits.detach()
        torch.testing.assert_close(trained, outputs[-1], rtol=1e-4, atol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3 < (outputs[1] - outputs[2]).abs().max()


@pytest.mark.parametrize("value", [0, 10, 16, -8])
def test_other_ranks_above_r_are_still_refused(value: int) -> None:
    with pytest.raises(ValueError, match="rank_pattern caps a module's rank"):
        DyLoRAConfig(r=8, rank_pattern={r".*\.gate_up_proj": value}, target_modules=["q_proj"])
    if value % 8 or value < 1:
        with pytest.raises(ValueError, match="rank_pattern caps a module's rank"):
            DyLoRAConfig(
                r=4,
                rank_pattern={r".*\.gate_up_proj": value},
                target_parameters=["gate_up_proj"],
                target_modules=["q_proj"],
            )


@pytest.mark.parametrize("how", ["list", "experts", "all-linear", "expression"])
@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("method", LINEAR_ONLY)
def test_experts_are_refused_by_name_where_they_cannot_be_adapted(method: str, name: str, how: str) -> None:
    base = moe(name)
    before = list(base.named_modules())
    config = OURS[method](task_type="CAUSAL_LM", target_modules=targets(name, how))
    with pytest.raises(ValueError, match=r"names the experts of \w+, which are 3-D parameters \(.*down_proj"):
        get_peft_model(base, config)
    assert list(base.named_modules()) == before


@pytest.mark.parametrize("method", LIKE_LORA)
def test_half_a_fused_projection_is_refused(method: str) -> None:
    base = moe("qwen3")
    with pytest.raises(ValueError, match="gate_proj without also targeting up_proj"):
        get_peft_model(base, OURS[method](target_modules=["gate_proj"]))
    assert not hasattr(base, "peft_config")


def test_dense_models_keep_their_targets() -> None:
    config = DyLoRAConfig(r=4, target_modules=["gate_proj", "up_proj"], task_type="CAUSAL_LM")
    from tests.tuners.common import tiny_llama

    get_peft_model(tiny_llama(), config)
    assert (config.target_modules, config.target_parameters) == ({"gate_proj", "up_proj"}, None)


@pytest.mark.parametrize("target", ["out_proj", "conv1d"])
@pytest.mark.parametrize("method", OURS)
def test_layers_that_mambas_kernels_read_without_calling_are_refused(method: str, target: str) -> None:
    base = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    more = {"activation_modules": ["act"]} if method == "density-lora" else {}  # its loss wants one by name
    with pytest.raises(ValueError, match=rf"incompatible with Mamba-based|{target}.* is a Conv1d"):
        get_peft_model(base, OURS[method](target_modules=[target], **more))


LORA_LIKE_METHODS = [name for name in METHODS if name != "loretta-adp"]


@pytest.mark.parametrize("method", LORA_LIKE_METHODS)
def test_a_conversion_from_a_changed_start_is_refused(method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion: it takes a changed start"):
        with_method(method).save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "start")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_what_peft_refuses_for_other_types_is_still_refused(method: str, tmp_path: Path) -> None:
    model = with_method(method)
    with pytest.raises(ValueError, match="not using LoRA"):
        reduce_intruder_dimension(model)
    base = with_method(method).unload()
    with pytest.raises(ValueError, match=r"can only be mixed|not compatible|not supported"):
        PeftMixedModel(base, METHODS[method]())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not supported|[Hh]otswapping"):
        hotswap_adapter(model, tmp_path, adapter_name="default")


@pytest.mark.parametrize("method", LORA_LIKE_METHODS)
def test_parts_of_a_sharded_model_are_told_of(method: str) -> None:
    """PEFT warns when a factor is empty, as under ZeRO-3 without gathering, for types that it knows."""
    model = with_method(method)
    whole = get_peft_model_state_dict(model)  # no warning, which would be an error here
    assert whole
    name = (
        next(n for n, p in model.named_parameters() if ".lora_A." in n and n.endswith(".weight"))
        if (not method.startswith("loretta"))
        else None
    )
    if name is not None:
        state = model.state_dict()
        state[name] = state[name][:0]
        with pytest.warns(PeftWarning, match="invalid shape"):
            get_peft_model_state_dict(model, state_dict=state)
