"""A stock LoRA at a lower rank: the leading components of its update, and PEFT's own layers again afterwards."""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from torch import nn

from peft_dynamic import at_rank, budget_ranks, drawn_rank, export_lora, get_rank, resize_adapter, set_rank
from peft_dynamic.export import PEFT_PREFIX
from tests.stock_cases import CASES, build

PLAIN = [name for name in CASES if name != "lora_bias"]


def adapted(case: str = "linear", **settings: Any) -> tuple[Any, torch.Tensor]:
    """A stock LoRA of rank 8 with random factors, in eval mode."""
    base, inputs = build(case)
    model = get_peft_model(base, LoraConfig(**({"r": 8, "lora_alpha": 6} | CASES[case].config | settings)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval(), inputs


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def compute(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(inputs)
    return output.logits if hasattr(output, "logits") else output


def fingerprint(model: nn.Module) -> list[Any]:
    """All that tells PEFT's own layers from ranked ones."""
    found: list[Any] = []
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        found.append((name, type(module), hooks, sorted(module.__dict__)))
        if isinstance(module, LoraLayer):
            held = (dict(module.scaling), module.r, module.lora_alpha, module.use_rslora, module.other_param_names)
            found.append(copy.deepcopy(held))
    return found


def dense(layer: Any) -> torch.Tensor:
    """The update as matrices, (n, out, in)."""
    delta = layer.get_delta_weight("default").detach().double()
    if getattr(layer, "fan_in_fan_out", False):
        delta = delta.mT
    return delta if type(layer).__name__ == "ParamWrapper" else delta.flatten(1)[None]


@pytest.mark.parametrize("case", [name for name in PLAIN if name not in ("attention", "convolutions")])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_rank_is_the_best_approximation_of_the_whole_update(case: str, rslora: bool) -> None:
    model, _ = adapted(case, use_rslora=rslora)
    whole = {name: dense(layer) for name, layer in layers(model)}
    with at_rank(model, 3):
        for name, layer in layers(model):
            u, s, vh = torch.linalg.svd(whole[name], full_matrices=False)
            best = (u[..., :3] * s[..., None, :3]) @ vh[..., :3, :]
            torch.testing.assert_close(dense(layer), best, rtol=0, atol=1e-4 * float(s.max()))


# PEFT's attention merges and unmerges in each forward pass, which moves the base weights by rounding.
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("case", [name for name in PLAIN if name != "attention"])
def test_afterwards_it_is_peft_s_own(case: str) -> None:
    model, inputs = adapted(case)
    rank = CASES[case].ranks[0]
    before, state, whole = fingerprint(model), dict(model.state_dict()), compute(model, inputs)
    with at_rank(model, rank):
        assert get_rank(model) == rank
        assert not torch.equal(compute(model, inputs), whole)
        assert model.state_dict().keys() == state.keys()
    assert torch.equal(compute(model, inputs), whole)
    assert fingerprint(model) == before
    assert all(value is state[name] or torch.equal(value, state[name]) for name, value in model.state_dict().items())
    set_rank(model, rank)
    assert get_rank(model) == rank
    set_rank(model, 8)
    assert fingerprint(model) == before


def test_a_scale_that_was_set_stays() -> None:
    model, inputs = adapted(use_rslora=True)
    for _, layer in layers(model):
        layer.set_scale("default", 0.5)
    halved = {name: layer.scaling["default"] for name, layer in layers(model)}
    whole = compute(model, inputs)
    with at_rank(model, 8):
        torch.testing.assert_close(compute(model, inputs), whole)
        layer.set_scale("default", 0.5)
        assert layer.scaling["default"] == pytest.approx(halved[f"{PEFT_PREFIX}head"])
    assert {name: layer.scaling["default"] for name, layer in layers(model)} == pytest.approx(halved)


def test_what_is_saved_at_a_lower_rank_is_the_whole_adapter(tmp_path: Path) -> None:
    model, inputs = adapted("patterns")
    whole = compute(model, inputs)
    set_rank(model, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("patterns")[0], tmp_path).eval()
    assert torch.equal(compute(loaded, inputs), whole)


def test_training_goes_on_at_the_whole_rank() -> None:
    model, inputs = adapted()
    twin = copy.deepcopy(model)
    set_rank(model, 2)
    for each in (model, twin):
        each.train()
        each(inputs).square().sum().backward()
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert one.requires_grad == ("lora_" in name)
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    fresh = copy.deepcopy(twin)
    fresh.load_state_dict(model.state_dict())
    with at_rank(fresh.eval(), 2):
        torch.testing.assert_close(compute(model.eval(), inputs), compute(fresh, inputs))


def test_a_merge_takes_the_rank_in_use() -> None:
    model, inputs = adapted()
    with at_rank(model, 2):
        small = compute(model, inputs)
        model.merge_adapter()
        torch.testing.assert_close(compute(model, inputs), small)
        with pytest.raises(ValueError, match="is merged at rank 2"):
            set_rank(model, 3)
        model.unmerge_adapter()
    set_rank(model, 2)
    torch.testing.assert_close(compute(model.merge_and_unload(), inputs), small)


def test_rank_0_leaves_a_module_without_its_update() -> None:
    model, inputs = adapted()
    set_rank(model, {"b": 0})
    assert get_rank(model) == {"base_model.model.a": 8, "base_model.model.b": 0, "base_model.model.head": 8}
    found = compute(model, inputs)
    twin, _ = adapted()
    with torch.no_grad():
        dict(layers(twin))["base_model.model.b"].lora_B["default"].weight.zero_()
    assert torch.equal(found, compute(twin, inputs))
    with pytest.raises(ValueError, match=r"rank=0 for .* is outside 1\.\.8"):
        set_rank(model, 0)


def test_several_adapters_are_ranked_each_for_itself() -> None:
    model, _inputs = adapted()
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=["a", "emb"]))
    before = fingerprint(model)
    with at_rank(model, 2, "default"), at_rank(model, 3, "other"):
        assert (get_rank(model, "default"), get_rank(model, "other")) == (2, 3)
        with at_rank(model, 1, "other"):
            assert get_rank(model, "other") == 1
        assert get_rank(model, "other") == 3
    assert fingerprint(model) == before
    set_rank(model, 2, "default")
    model.set_adapter("other")
    model.delete_adapter("default")
    assert get_rank(model) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_what_is_more_than_a_product_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, _ = adapted(**settings)
    before = fingerprint(model)
    for call in (lambda: set_rank(model, 2), lambda: export_lora(model, tmp_path / "out", 2)):
        with pytest.raises(ValueError, match=message):
            call()
    assert fingerprint(model) == before
    assert not (tmp_path / "out").exists()


def test_a_rank_above_the_adapter_s_is_refused() -> None:
    model, _ = adapted()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"rank=9 for .* is outside 1\.\.8"):
        set_rank(model, 9)
    with pytest.raises(ValueError, match="match no module"), at_rank(model, {"nothing": 2}):
        pass
    with pytest.raises(ValueError, match="no DyLoRA adapter"):
        drawn_rank(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("case", [name for name in PLAIN if name not in ("experts", "convolutions", "attention")])
def test_an_export_is_what_the_file_resized_is(case: str, tmp_path: Path) -> None:
    model, inputs = adapted(case, use_rslora=True)
    model.save_pretrained(tmp_path / "whole")
    with at_rank(model, 3):
        at_three = compute(model, inputs)
    export_lora(model, tmp_path / "out", 3)
    resize_adapter(tmp_path / "whole", tmp_path / "resized", rank=3)
    for folder in ("out", "resized"):
        loaded = PeftModel.from_pretrained(build(case)[0], tmp_path / folder).eval()
        assert loaded.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(compute(loaded, inputs), at_three, rtol=1e-4, atol=1e-3)


def test_an_export_leaves_out_what_has_rank_0(tmp_path: Path) -> None:
    model, inputs = adapted()
    with at_rank(model, {"b": 0, "a": 2}):
        expected = compute(model, inputs)
        export_lora(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(build("linear")[0], tmp_path / "out").eval()
    assert [name for name, _ in layers(loaded)] == ["base_model.model.a", "base_model.model.head"]
    torch.testing.assert_close(compute(loaded, inputs), expected)
    with at_rank(model, {"a": 0, "b": 0, "head": 0}), pytest.raises(ValueError, match="rank 0 in all modules"):
        export_lora(model, tmp_path / "none")


def test_an_export_at_the_whole_rank_has_the_same_tensors(tmp_path: Path) -> None:
    model, inputs = adapted()
    export_lora(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(build("linear")[0], tmp_path / "out").eval()
    assert torch.equal(compute(loaded, inputs), compute(model, inputs))


def test_of_a_transformers_model_with_an_adapter() -> None:
    from tests.tuners.common import tiny_llama

    model = tiny_llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.eval()
    before, ids = fingerprint(model), torch.randint(0, 60, (2, 5))
    whole = compute(model, ids)
    with at_rank(model, 1):
        assert not torch.allclose(compute(model, ids), whole)
    assert torch.equal(compute(model, ids), whole)
    assert fingerprint(model) == before


def test_threads_take_turns() -> None:
    model, inputs = adapted()
    with at_rank(model, 1):
        expected = {1: compute(model, inputs)}
    with at_rank(model, 4):
        expected[4] = compute(model, inputs)
    before, wrong = fingerprint(model), []

    def serve(rank: int) -> None:
        for _ in range(30):
            with at_rank(model, rank):
                if not torch.equal(compute(model, inputs), expected[rank]):
                    wrong.append(rank)

    threads = [threading.Thread(target=serve, args=(rank,)) for rank in (1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert fingerprint(model) == before


def test_a_copy_has_a_rank_of_its_own() -> None:
    model, inputs = adapted()
    whole = compute(model, inputs)
    set_rank(model, 2)
    twin = copy.deepcopy(model)
    set_rank(model, 8)
    assert get_rank(twin) == 2
    assert torch.equal(compute(model, inputs), whole)
    set_rank(twin, 8)
    assert torch.equal(compute(twin, inputs), whole)


def test_attention_has_ranks_and_keeps_its_kind() -> None:
    model, inputs = adapted("attention")
    before, whole = fingerprint(model), compute(model, inputs)
    with at_rank(model, 2):
        assert sum(isinstance(module, MultiheadAttention) for module in model.modules()) == 1
        assert (compute(model, inputs) - whole).abs().max() > 1e-2
    torch.testing.assert_close(compute(model, inputs), whole)
    assert fingerprint(model) == before


# --- what a lower rank must not spoil


def tied(**settings: Any) -> Any:
    """Embedding and head share their factors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True, "use_cache": False}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    targets = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(r=8, **targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_layers_that_share_factors_have_one_cut(tmp_path: Path) -> None:
    model, ids = tied(), torch.randint(0, 60, (2, 5))
    with at_rank(model, 2):
        expected = compute(model, ids)
        export_lora(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(tied().unload(), tmp_path / "out").eval()
    torch.testing.assert_close(compute(loaded, ids), expected, rtol=1e-3, atol=1e-3)
    for ranks in ({"embed_tokens": 2}, {"lm_head": 0}):
        with pytest.raises(ValueError, match="ensure_weight_tying=True"):
            set_rank(model, ranks)
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="ensure_weight_tying=True: layers share their factors"):
        resize_adapter(tmp_path / "whole", tmp_path / "small", rank=2)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_module_of_rank_0_keeps_its_trained_bias(bias: str, tmp_path: Path) -> None:
    model, inputs = adapted(bias=bias)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(1.0)
    model.save_pretrained(tmp_path / "whole")
    with at_rank(model, {"b": 0}):
        expected = compute(model, inputs)
        export_lora(model, tmp_path / "exported")
    resize_adapter(tmp_path / "whole", tmp_path / "resized", rank={"b": 0})
    for folder in ("exported", "resized"):
        loaded = PeftModel.from_pretrained(build("linear")[0], tmp_path / folder).eval()
        torch.testing.assert_close(compute(loaded, inputs), expected)


class Nested(nn.Module):
    """One module's name is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.sub = nn.Linear(8, 8), nn.ModuleDict({"a": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sub["a"](self.a(x))


def test_a_dropped_module_does_not_come_back_by_the_end_of_its_name(tmp_path: Path) -> None:
    model = get_peft_model(Nested(), LoraConfig(r=4, target_modules=["a"], init_lora_weights=False)).eval()
    x, ranks = torch.randn(3, 8), {r"^base_model\.model\.sub\.a": 0}
    model.save_pretrained(tmp_path / "whole")
    with at_rank(model, ranks):
        expected = compute(model, x)
        export_lora(model, tmp_path / "exported")
    resize_adapter(tmp_path / "whole", tmp_path / "resized", rank={r"^sub\.a": 0})
    for folder in ("exported", "resized"):
        loaded = PeftModel.from_pretrained(Nested(), tmp_path / folder).eval()
        assert [name for name, _ in layers(loaded)] == ["base_model.model.a"]
        torch.testing.assert_close(compute(loaded, x), expected)


def two_active() -> tuple[Any, torch.Tensor]:
    model, inputs = adapted()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["a"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    return model, inputs


def test_all_active_adapters_get_the_rank_also_where_one_has_one() -> None:
    model, _ = two_active()
    set_rank(model, 4, "default")
    set_rank(model, 2)
    assert (get_rank(model, "default"), get_rank(model, "other")) == (2, 2)


def test_what_is_refused_changes_nothing() -> None:
    model, _ = two_active()
    with pytest.raises(ValueError, match=r"rank=6 for .* is outside 1\.\.4"):
        set_rank(model, 6)
    assert (get_rank(model, "default"), get_rank(model, "other")) == (8, 4)
    model, _ = adapted()
    before = fingerprint(model)
    dict(layers(model))["base_model.model.b"].merge()
    with pytest.raises(ValueError, match="is merged at rank 8"):
        set_rank(model, 2)
    dict(layers(model))["base_model.model.b"].unmerge()
    assert get_rank(model) == 8
    assert fingerprint(model) == before
    nn.init.constant_(dict(layers(model))["base_model.model.b"].lora_A["default"].weight, float("nan"))
    for call in (lambda: set_rank(model, 2), lambda: budget_ranks(model, 0.5)):
        with pytest.raises(RuntimeError, match="holds NaN"):
            call()
    assert get_rank(model) == 8


def test_an_active_lora_is_exported_beside_another_that_has_a_rank(tmp_path: Path) -> None:
    model, inputs = two_active()
    set_rank(model, 2, "default")
    model.set_adapter("other")
    export_lora(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(build("linear")[0], tmp_path / "out").eval()
    torch.testing.assert_close(compute(loaded, inputs), compute(model, inputs))


@pytest.mark.parametrize("name", ["hotswap_adapter", "prepare_model_for_compiled_hotswap"])
def test_what_would_write_into_the_part_in_use_is_refused(name: str, tmp_path: Path) -> None:
    from peft.utils import hotswap

    model, inputs = adapted()
    twin, _ = adapted()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    twin.save_pretrained(tmp_path)
    call = getattr(hotswap, name)
    words: dict[str, Any] = {"target_rank": 16}
    if name == "hotswap_adapter":
        words = {"model_name_or_path": str(tmp_path), "adapter_name": "default"}
    set_rank(model, 2)
    with pytest.raises(ValueError, match="'default' is at a lower rank"):
        call(model, **words)
    set_rank(model, 8)
    call(model, **words)
    expected = twin if name == "hotswap_adapter" else adapted()[0]
    torch.testing.assert_close(compute(model, inputs), compute(expected, inputs))


@pytest.mark.parametrize("how", ["merge_and_unload", "unload", "delete"])
def test_hooks_go_with_the_adapter(how: str) -> None:
    model, inputs = adapted()
    set_rank(model, 2)
    if how == "delete":
        root = model.get_base_model()
        model.add_adapter("other", LoraConfig(r=4, target_modules=["a"]))
        model.set_adapter("other")
        model.delete_adapter("default")
    else:
        root = getattr(model, how)()
    root(inputs)
    assert (len(root._forward_hooks), len(root._forward_pre_hooks)) == (0, 0)


def test_a_copy_s_hooks_go_too() -> None:
    model, inputs = adapted()
    before = fingerprint(model)
    set_rank(model, 2)
    twin = copy.deepcopy(model)
    set_rank(twin, 8)
    assert fingerprint(twin) == before
    assert get_rank(model) == 2
    twin = copy.deepcopy(model)
    small = compute(model, inputs)
    assert torch.equal(compute(twin, inputs), small)
    root = twin.unload()
    root(inputs)
    assert not root._forward_hooks


@pytest.mark.parametrize("case", ["attention", "experts"])
@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_budgets_keep_together_what_a_file_keeps_together(case: str, share: float, tmp_path: Path) -> None:
    model, inputs = adapted(case)
    model.save_pretrained(tmp_path / "whole")
    resize_adapter(tmp_path / "whole", tmp_path / "resized", parameters=share)
    with at_rank(model, budget_ranks(model, share)):
        export_lora(model, tmp_path / "exported")
        expected = compute(model, inputs)
    for folder in ("exported", "resized"):
        loaded = PeftModel.from_pretrained(build(case)[0], tmp_path / folder).eval()
        torch.testing.assert_close(compute(loaded, inputs), expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_may_be_deleted_inside_the_block() -> None:
    model, _ = adapted()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["a"]))
    with at_rank(model, 2, "default"):
        model.set_adapter("other")
        model.delete_adapter("default")
    assert get_rank(model) == 4


def test_what_get_rank_gives_can_be_set_again() -> None:
    model = get_peft_model(Nested(), LoraConfig(r=4, target_modules=["a"], init_lora_weights=False)).eval()
    set_rank(model, {r"^base_model\.model\.sub\.a": 2})
    found = get_rank(model)
    assert found == {"base_model.model.a": 4, "base_model.model.sub.a": 2}
    assert isinstance(found, dict)
    set_rank(model, 1)
    set_rank(model, found)
    assert get_rank(model) == found
