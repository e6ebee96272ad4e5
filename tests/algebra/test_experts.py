"""Adapters of experts (`target_parameters`) and of grouped convolutions: n products in one pair of tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_dynamic import DyLoRAConfig, MoSLoRAConfig, average_adapters, merge_adapters, resize_adapter
from peft_dynamic.algebra.checkpoint import read_checkpoint
from peft_dynamic.algebra.experts import places
from peft_dynamic.algebra.inspect import energy_kept, energy_table
from tests.conformance.cases import perturb
from tests.stock_cases import CASES, build
from tests.tuners.common import rows

GATE, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24}
# PEFT looks for a pattern of `rank_pattern` among the modules alone, and uses it for parameters all the same.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")


def mixture(kind: str = "qwen") -> Any:
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2))
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes))


def saved(folder: Path, seed: int = 1, kind: str = "qwen", **settings: Any) -> Path:
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": [GATE, DOWN]}
    config = LoraConfig(**(defaults | {"task_type": "CAUSAL_LM"} | settings))
    model = get_peft_model(mixture(kind), config)
    perturb(model, seed)
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, kind: str = "qwen") -> Any:
    return PeftModel.from_pretrained(mixture(kind), folder).eval()


def logits(folder: Path, kind: str = "qwen") -> torch.Tensor:
    with torch.no_grad():
        return loaded(folder, kind)(input_ids=rows(2)).logits


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """Each parameter's or module's update, (n, ., .) for experts, as PEFT computes it."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", ()):
            key = name.replace(".base_layer", "") + "." + getattr(module, "parameter_name", "weight")
            found[key] = module.get_delta_weight("default").detach().double()
    return found


def best(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The dense reference: each expert's update cut by its own singular value decomposition."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


KINDS: dict[str, dict[str, Any]] = {
    "both parameters": {},
    "one parameter": {"target_parameters": [GATE]},
    "no module": {"target_modules": [], "target_parameters": [DOWN]},
    "mixtral": {"kind": "mixtral", "target_parameters": [GATE, DOWN], "use_rslora": True},
    "a rank for one": {"rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "a rank for a layer": {"rank_pattern": {r".*layers\.0\.mlp\.experts\..*": 3}},
    "a name without a dot": {"target_parameters": ["gate_up_proj", "down_proj"]},
    "a router": {"target_parameters": ["gate.weight", GATE], "rank_pattern": {r"gate\.weight": 3}},
    "a matrix by a name without a dot": {"target_modules": [], "target_parameters": ["down_proj", "gate_up_proj"]},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_full_rank_is_the_adapter_itself_and_a_rank_each_expert_s_best(name: str, tmp_path: Path) -> None:
    kind = KINDS[name].get("kind", "qwen")
    whole = saved(tmp_path / "whole", **KINDS[name])
    resize_adapter(whole, tmp_path / "same", rank=4)
    assert torch.equal(logits(tmp_path / "same", kind), logits(whole, kind))
    resize_adapter(whole, tmp_path / "small", rank=2)
    small = deltas(loaded(tmp_path / "small", kind))
    full = deltas(loaded(whole, kind))
    assert small.keys() == full.keys()
    for key, delta in full.items():
        torch.testing.assert_close(small[key], best(delta, 2), atol=2e-5, rtol=1e-4, msg=key)
    assert (logits(tmp_path / "small", kind) - logits(whole, kind)).abs().max() > 1e-3


def test_a_budget_counts_all_experts_and_parameters_that_nothing_tells_apart_keep_one_rank(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", target_modules=[])
    read = read_checkpoint(whole)
    full = deltas(loaded(whole))
    worth: dict[int, Any] = {}
    for layer in (0, 1):
        host = f"base_model.model.model.layers.{layer}.mlp.experts"
        names = (f"{host}.gate_up_proj", f"{host}.down_proj")
        worth[layer] = sum(torch.linalg.svdvals(full[name]).square().sum(0)[:4] for name in names)
        # 4 experts, of 16 -> 24 and of 12 -> 16: a rank of both costs 272
        found = read.products[f"{host}.base_layer"], read.products[host]
        assert [product.cost for product in found] == [160, 112]
        assert [product.experts for product in found] == [4, 4]
    resize_adapter(whole, tmp_path / "small", parameters=3 * 272)
    small = read_checkpoint(tmp_path / "small")
    order = sorted((-float(w), layer) for layer in worth for w in worth[layer])[:3]
    taken = [sum(layer == of for _, of in order) for layer in (0, 1)]
    ranks = {name: product.rank for name, product in small.products.items() if product.of_parameter}
    assert {r for name, r in ranks.items() if "layers.0." in name} == {taken[0]} - {0}
    assert {r for name, r in ranks.items() if "layers.1." in name} == {taken[1]} - {0}
    kept = deltas(loaded(tmp_path / "small"))
    for key, delta in kept.items():
        if "experts" in key:
            layer = 0 if "layers.0." in key else 1
            torch.testing.assert_close(delta, best(full[key], taken[layer]), atol=2e-5, rtol=1e-4)


def test_a_parameter_whose_name_has_no_dot_is_no_module(tmp_path: Path) -> None:
    """The `weight` of a linear layer, as a parameter: PEFT looks up its rank under another name than the layer's."""
    base, _ = build("linear")
    config = LoraConfig(r=4, target_modules=["b"], target_parameters=["weight"], exclude_modules=["head"])
    with pytest.raises(ValueError, match="which is not a valid target"):
        get_peft_model(base, config)  # the layer `b`, twice
    base, _ = build("linear")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=[], target_parameters=["weight"]))
    perturb(model)
    model.save_pretrained(tmp_path / "whole")
    resize_adapter(tmp_path / "whole", tmp_path / "small", rank={"a.weight": 2, "head.weight": 0})
    small = PeftModel.from_pretrained(build("linear")[0], tmp_path / "small")
    found, full = deltas(small), deltas(model)
    assert {*full} - {*found} == {"base_model.model.head.weight"}
    for key, delta in found.items():
        wanted = best(full[key], 2 if ".a." in key else 4)
        torch.testing.assert_close(delta, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kept", [2, 3])
def test_what_is_written_can_be_read_again(kept: int, tmp_path: Path) -> None:
    """Ranks of 3 and 4 tell the parameters apart. At one rank their scales must be one."""
    whole = saved(tmp_path / "whole", rank_pattern={"gate_up_proj": 3}, alpha_pattern={"down_proj": 5}, use_rslora=True)
    resize_adapter(whole, tmp_path / "small", rank=kept)
    resize_adapter(tmp_path / "small", tmp_path / "smaller", rank=1)
    full = deltas(loaded(whole))
    for folder, rank in (("small", kept), ("smaller", 1)):
        for key, delta in deltas(loaded(tmp_path / folder)).items():
            torch.testing.assert_close(delta, best(full[key], rank), atol=2e-5, rtol=1e-4)


def test_all_linear_layers_of_a_mixture_as_peft_converts_them(tmp_path: Path) -> None:
    """PEFT gives the fused projection twice the rank, and takes the router's weight as a parameter."""
    whole = saved(tmp_path / "whole", target_modules="all-linear", target_parameters=None, use_rslora=True)
    full = deltas(loaded(whole))
    ranks = {name.rpartition(".")[2]: p.rank for name, p in read_checkpoint(whole).products.items()}
    assert (ranks["base_layer"], ranks["experts"], ranks["gate"]) == (8, 4, 4)
    resize_adapter(whole, tmp_path / "small", parameters=0.4)
    small, sizes = deltas(loaded(tmp_path / "small")), read_checkpoint(tmp_path / "small")
    assert sizes.size <= 0.4 * read_checkpoint(whole).size
    assert {*small} < {*full}
    for key, delta in small.items():
        found = torch.linalg.matrix_rank(delta, atol=1e-4).max()
        torch.testing.assert_close(delta, best(full[key], int(found)), atol=2e-5, rtol=1e-4)


def test_a_parameter_can_be_left_out_where_its_name_is_known(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", rank_pattern={"gate_up_proj": 3})
    resize_adapter(whole, tmp_path / "gate", rank={"down_proj": 0, "gate_up_proj": 2, "q_proj": 0})
    found, full = deltas(loaded(tmp_path / "gate")), deltas(loaded(whole))
    assert {*found} == {key for key in full if key.endswith("gate_up_proj")}
    for key, delta in found.items():
        torch.testing.assert_close(delta, best(full[key], 2), atol=2e-5, rtol=1e-4)
    names = {*load_file(tmp_path / "gate" / "adapter_model.safetensors")}
    assert not [name for name in names if "base_layer" in name]


def test_a_sum_and_a_mean_are_those_of_each_expert(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "one", 1), saved(tmp_path / "other", 2, r=2, use_rslora=True)
    parts = deltas(loaded(one)), deltas(loaded(other))
    merge_adapters({str(one): 0.7, str(other): -0.3}, tmp_path / "sum")
    merge_adapters({str(one): 0.7, str(other): -0.3}, tmp_path / "small", rank=2)
    average_adapters([one, other], tmp_path / "mean", rank=6)
    exact, small, mean = (deltas(loaded(tmp_path / name)) for name in ("sum", "small", "mean"))
    for key, delta in exact.items():
        wanted = 0.7 * parts[0][key] - 0.3 * parts[1][key]
        torch.testing.assert_close(delta, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(small[key], best(wanted, 2), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(mean[key], (parts[0][key] + parts[1][key]) / 2, atol=1e-5, rtol=1e-4)


def test_a_sum_with_an_adapter_of_modules_has_the_targets_of_both(tmp_path: Path) -> None:
    experts = saved(tmp_path / "experts", target_modules=[])
    attention = saved(tmp_path / "attention", 2, target_parameters=None, target_modules=["v_proj"])
    merge_adapters({str(attention): 1.0, str(experts): 2.0}, tmp_path / "sum")
    found = deltas(loaded(tmp_path / "sum"))
    wanted = deltas(loaded(attention)) | {key: 2 * delta for key, delta in deltas(loaded(experts)).items()}
    assert found.keys() == wanted.keys()
    for key, delta in found.items():
        torch.testing.assert_close(delta, wanted[key], atol=1e-5, rtol=1e-4)


class Square(torch.nn.Module):
    """Two parameters of one shape, which no file tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (torch.nn.Parameter(torch.randn(3, 8, 8)) for _ in "ab")


class Holder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Square()


def test_a_sum_needs_the_same_parameters(tmp_path: Path) -> None:
    for name, targets in (("one", ["experts.one"]), ("two", ["experts.two"]), ("both", ["experts.one", "experts.two"])):
        config = LoraConfig(r=2, target_modules=[], target_parameters=targets)
        get_peft_model(Holder(), config).save_pretrained(tmp_path / name)
    for other in ("two", "both"):
        names = {str(tmp_path / name): 1.0 for name in ("one", other)}
        with pytest.raises(ValueError, match=r"adapt other parameters of .*experts, .* the same target_parameters"):
            merge_adapters(names, tmp_path / "out")
    both, gate = saved(tmp_path / "qwen both"), saved(tmp_path / "qwen gate", target_parameters=[GATE])
    with pytest.raises(ValueError, match="is of another shape"):
        merge_adapters({str(both): 1.0, str(gate): 1.0}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "rank", "message"),
    [
        ({"alpha_pattern": {"gate_up_proj": 3}}, 2, "does not tell which of .* is which"),
        ({}, {"gate_up_proj": 2}, "does not tell which of .* they keep one rank"),
        ({}, {"experts.*": 9}, r"rank\['experts.\*'\]=9: must be a whole number from 0 to 4"),
    ],
)
def test_what_the_file_does_not_tell_is_refused(settings: Any, rank: Any, message: str, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", **settings)
    with pytest.raises(ValueError, match=message):
        resize_adapter(whole, tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_of_experts_is_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole")
    path = whole / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if "experts" in name and "lora_A" in name)
    for rows_left, message in ((15, "no experts times rank 4"), (12, "has factors of shape")):
        save_file({**tensors, key: tensors[key][:rows_left].clone()}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            resize_adapter(whole, tmp_path / "out", rank=2)


def test_parameters_are_told_apart_by_the_number_of_experts() -> None:
    """8 experts: 16 rows at rank 2, 24 at rank 3. The other way round it would be 16 / 3 of them."""
    ranks = {"m.up": (2, 1.0), "m.down": (3, 1.0)}
    found = places({"m": 24, "m.base_layer": 16}, [*ranks], ranks.__getitem__)
    assert (found["m"].keys, found["m"].rank, found["m"].experts) == (("m.down",), 3, 8)
    assert (found["m.base_layer"].keys, found["m.base_layer"].rank, found["m.base_layer"].experts) == (("m.up",), 2, 8)


@pytest.mark.parametrize("mixed", [False, True])
def test_adapters_of_ours_on_experts(mixed: bool, tmp_path: Path) -> None:
    base, inputs = build("experts")
    settings = {"r": 4, "target_modules": ["first"], "target_parameters": ["experts.up", "experts.down"]}
    config = MoSLoRAConfig(**settings) if mixed else DyLoRAConfig(**settings)
    model = get_peft_model(base, config)
    perturb(model)
    model.save_pretrained(tmp_path / "ours")
    resize_adapter(tmp_path / "ours", tmp_path / "stock", rank=4)
    stock = PeftModel.from_pretrained(build("experts")[0], tmp_path / "stock").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(inputs), model.eval()(inputs), atol=1e-4, rtol=1e-4)


def test_the_energy_of_experts_is_that_of_all(tmp_path: Path) -> None:
    read = read_checkpoint(saved(tmp_path / "whole", target_parameters=[GATE]))
    full = deltas(loaded(tmp_path / "whole"))
    name = next(key for key in full if "experts" in key)
    squares = torch.linalg.svdvals(full[name]).square().sum(0)[:4]
    found = energy_kept(read)[name.removesuffix(".gate_up_proj")]
    torch.testing.assert_close(torch.tensor(found).double(), squares.cumsum(0) / squares.sum(), atol=1e-5, rtol=1e-5)


GROUPED = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")


def convolutions(folder: Path, seed: int = 1, **settings: Any) -> Path:
    """Convolutions in one, two and three dimensions; that of `g2` has two groups."""
    config = {"r": 4, "lora_alpha": 6} | CASES["convolutions"].config | settings
    model = get_peft_model(build("convolutions")[0], LoraConfig(**config))
    perturb(model, seed)
    model.save_pretrained(folder)
    return folder


def output(folder: Path) -> torch.Tensor:
    base, inputs = build("convolutions")
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder).eval()(inputs)


def of_groups(folder: Path) -> torch.Tensor:
    """The update of `g2`, (2, 4, 72): each group of outputs has half of the components, which see all inputs."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.g2.lora_{end}.weight"].double() for end in "AB")
    (product,) = (p for name, p in read_checkpoint(folder).products.items() if name.endswith("g2"))
    half = len(a) // 2
    parts = [b[4 * g : 4 * g + 4].flatten(1) @ a[half * g : half * g + half].flatten(1) for g in (0, 1)]
    return product.scale * torch.stack(parts)


@GROUPED
def test_the_groups_of_a_convolution_are_cut_apart(tmp_path: Path) -> None:
    whole = convolutions(tmp_path / "whole")
    resize_adapter(whole, tmp_path / "same", rank=4)
    assert torch.equal(output(tmp_path / "same"), output(whole))
    resize_adapter(whole, tmp_path / "small", rank=2)
    torch.testing.assert_close(of_groups(tmp_path / "small"), best(of_groups(whole), 1), atol=1e-5, rtol=1e-4)
    # what PEFT computes at rank 2 is what the dense updates of the groups give
    base, inputs = build("convolutions")
    model = PeftModel.from_pretrained(base, tmp_path / "small").eval()
    layer, seen = model.base_model.model.g2, []
    layer.register_forward_hook(lambda _, args, result: seen.append((args[0], result)))
    with torch.no_grad():
        model(inputs)
        ((x, y),) = seen
        update = y - layer.base_layer(x)
        kernel = best(of_groups(whole), 1).reshape(8, 8, 3, 3).to(x)
        torch.testing.assert_close(update, torch.nn.functional.conv2d(x, kernel), atol=1e-5, rtol=1e-4)


@GROUPED
def test_a_rank_that_the_groups_do_not_divide_is_refused(tmp_path: Path) -> None:
    whole = convolutions(tmp_path / "whole")
    for rank in (3, {"g2": 3}):
        with pytest.raises(
            ValueError, match=r"g2 is a convolution of 2 groups, whose rank is a multiple of 2, and got 3"
        ):
            resize_adapter(whole, tmp_path / "out", rank=rank)
    with pytest.raises(ValueError, match=r"rank=1: .*g2 is a convolution of 2 groups"):
        merge_adapters({str(whole): 1.0}, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


@GROUPED
def test_a_budget_takes_as_many_components_as_there_are_groups(tmp_path: Path) -> None:
    whole = convolutions(tmp_path / "whole", target_modules=["g2"])
    (product,) = read_checkpoint(whole).products.values()
    assert (product.rank, product.steps, product.cost) == (4, 2, 2 * (72 + 4))  # two rows of A, a column of B
    resize_adapter(whole, tmp_path / "small", parameters=303)
    (small,) = read_checkpoint(tmp_path / "small").products.values()
    assert (small.rank, small.size) == (2, 152)
    torch.testing.assert_close(of_groups(tmp_path / "small"), best(of_groups(whole), 1), atol=1e-5, rtol=1e-4)
    assert "100.0%" in energy_table(read_checkpoint(whole))


@GROUPED
def test_a_sum_of_grouped_convolutions(tmp_path: Path) -> None:
    one, other = convolutions(tmp_path / "one", 1), convolutions(tmp_path / "other", 2, r=2)
    merge_adapters({str(one): 0.5, str(other): 2.0}, tmp_path / "sum")
    wanted = 0.5 * of_groups(one) + 2 * of_groups(other)
    torch.testing.assert_close(of_groups(tmp_path / "sum"), wanted, atol=1e-5, rtol=1e-4)
    base = build("convolutions")
    with torch.no_grad():
        parts = output(one), output(other), base[0](base[1])
    merge_adapters({str(one): 1.0}, tmp_path / "alone")
    torch.testing.assert_close(output(tmp_path / "alone"), parts[0], atol=1e-5, rtol=1e-4)
