"""ScaLearn: its equation by hand, what is learned and what is not, sources of every kind, and one LoRA in the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_dynamic import (
    DyLoRAConfig,
    LorettaRepConfig,
    MoSLoRAConfig,
    ScaLearnConfig,
    adapter_moments,
    export_lora,
    learn_scales,
    resize_adapter,
)
from tests.conformance.cases import perturb
from tests.processes import python
from tests.tuners.common import optimizer_of, rows, tiny_llama, train, trainable_state

LAYERS, TARGETS = 2, ("q_proj", "v_proj", "down_proj")
WIDTHS = {"q_proj": 32, "v_proj": 16, "down_proj": 32}  # outputs in tiny_llama


class Bare(nn.Module):
    """y = 0 x, so that the output is the update."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(self.a.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


def saved(model: Any, config: Any, out: Path, seed: int) -> str:
    """A finished adapter's folder."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    perturb(adapted, seed=seed)
    adapted.save_pretrained(str(out))
    return str(out)


def lora(out: Path, seed: int, **settings: Any) -> str:
    config = LoraConfig(
        **({"r": 2, "lora_alpha": 4, "target_modules": [*TARGETS], "task_type": "CAUSAL_LM"} | settings)
    )
    return saved(tiny_llama(), config, out, seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three sources, of ranks 2, 3 and 2."""
    work = tmp_path_factory.mktemp("sources")
    return {
        "c": lora(work / "c", 1),
        "a": lora(work / "a", 2, r=3, use_rslora=True),
        "b": lora(work / "b", 3, rank_pattern={"v_proj": 1}, alpha_pattern={"layers.0.self_attn.q_proj": 1}),
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows(3)).logits


def over(adapters: dict[str, str], **settings: Any) -> Any:
    config = ScaLearnConfig(adapters=adapters, **({"task_type": "CAUSAL_LM"} | settings))
    return get_peft_model(tiny_llama(), config)


def omegas(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_scales." in name}


def layers_of(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_views")}


def test_the_golden_example(tmp_path: Path) -> None:
    """A_1 = (1 0), B_1 = (1 2)^T, omega_1 = (1, 0.5); A_2 = (0 1), B_2 = (3 -1)^T, omega_2 = (0, 2); x = (2, 1).

    A_1 x = 2, B_1 A_1 x = (2, 4), omega_1 (*) that = (2, 2); A_2 x = 1, B_2 A_2 x = (3, -1), omega_2 (*) that =
    (0, -2). Their sum is (2, 0).
    """
    for name, a, b in (("one", [[1.0, 0.0]], [[1.0], [2.0]]), ("two", [[0.0, 1.0]], [[3.0], [-1.0]])):
        model = get_peft_model(Bare(), LoraConfig(r=1, lora_alpha=1, target_modules=["a"]))
        layer = model.base_model.model.a
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(torch.tensor(a))
            layer.lora_B["default"].weight.copy_(torch.tensor(b))
        model.save_pretrained(str(tmp_path / name))
    adapters = {name: str(tmp_path / name) for name in ("one", "two")}
    model = get_peft_model(Bare(), ScaLearnConfig(adapters=adapters)).eval()
    layer = model.base_model.model.a
    with torch.no_grad():
        layer.lora_scales["default"].weight.copy_(torch.tensor([[1.0, 0.5], [0.0, 2.0]]))
    x, expected = torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    assert torch.equal(model(x), expected)
    # [diag(1, 0.5) (1 2)^T, diag(0, 2) (3 -1)^T], of rank 1 + 1
    assert torch.equal(layer.lora_B["default"].weight, torch.tensor([[1.0, 0.0], [1.0, -2.0]]))
    model.merge(tmp_path / "out")
    assert torch.equal(PeftModel.from_pretrained(Bare(), tmp_path / "out")(x), expected)
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", 2, 2)
    # rank 1 of B' A = [[1, 0], [1, -2]] = U S V^T: S^2 are the roots of t^2 - 6 t + 4, 3 + sqrt(5) and 3 - sqrt(5)
    model.merge(tmp_path / "one-rank", rank=1)
    cut = PeftModel.from_pretrained(Bare(), tmp_path / "one-rank")(torch.eye(2)).detach()
    assert torch.linalg.svdvals(cut)[0].item() == pytest.approx((3 + 5**0.5) ** 0.5, rel=1e-6)


def numbers(shape: str, shared: bool) -> int:
    """T d L, T L, T d and T, with d the outputs of a layer."""
    if shared:
        return 3 * (32 if shape == "vector" else 1)
    widths = [WIDTHS[target] if shape == "vector" else 1 for target in TARGETS]
    return 3 * sum(widths) * LAYERS


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", ["vector", "scalar"])
def test_the_numbers_learned_are_exact_and_the_only_ones(
    folders: dict[str, str], tmp_path: Path, shape: str, shared: bool
) -> None:
    adapters = folders
    if shared and shape == "vector":  # of one width
        adapters = {name: lora(tmp_path / name, 1, target_modules=["q_proj", "down_proj"]) for name in folders}
    model = over(adapters, shape=shape, shared=shared)
    assert model.get_nb_trainable_parameters()[0] == numbers(shape, shared)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_scales.default.weight" in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, 3, optimizer_of(model, weight_decay=0.1))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {*trained}
    # nothing that PEFT does to an adapter lets the sources be trained
    model.set_adapter("default")
    model.base_model.set_requires_grad("default")
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    model.add_adapter("second", ScaLearnConfig(adapters=adapters, shape=shape, shared=shared, task_type="CAUSAL_LM"))
    model.delete_adapter("second")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    state = model.state_dict()
    model.save_pretrained(tmp_path / "saved")
    file = load_file(tmp_path / "saved/adapter_model.safetensors")
    assert sum(t.numel() for key, t in file.items() if "lora_scales" in key) == numbers(shape, shared)
    assert not [key for key in state if key.endswith("second.weight")]


def reference(model: Any, folders: dict[str, str], x: torch.Tensor, at: str) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_t omega_t (*) s_t B_t A_t x in float64, from the files, and the same of absolute values."""
    layer = layers_of(model)[at]
    total = size = torch.zeros(len(x), layer.out_features, dtype=torch.float64)
    for omega, (_, folder) in zip(layer.lora_scales["default"].weight, sorted(folders.items()), strict=True):
        written = json.loads(Path(folder, "adapter_config.json").read_text())
        tensors = load_file(Path(folder, "adapter_model.safetensors"))
        a, b = (tensors[f"{at}.lora_{side}.weight"].double() for side in "AB")
        alpha = next((v for k, v in written["alpha_pattern"].items() if at.endswith(k)), written["lora_alpha"])
        s = alpha / (len(a) ** 0.5 if written["use_rslora"] else len(a))
        wide = omega.detach().double()
        total = total + wide * (s * (x.double() @ a.T @ b.T))
        size = size + wide.abs() * (abs(s) * (x.double().abs() @ a.abs().T @ b.abs().T))
    return total, size


@pytest.mark.parametrize("settings", [{}, {"shape": "scalar"}, {"shape": "scalar", "shared": True}], ids=str)
def test_the_update_is_the_scaled_sum_of_the_sources(folders: dict[str, str], settings: dict[str, Any]) -> None:
    """Within (in + r + 3) roundings of the sum of absolute values: a dot of `in`, one of r, s, omega and a sum."""
    model = over(folders, **settings).eval()
    perturb(model)
    if settings.get("shared"):
        owner = next(iter(layers_of(model).values()))
        for layer in layers_of(model).values():
            layer.lora_scales = owner.lora_scales  # for the reference alone, which asks each layer
    for at, layer in layers_of(model).items():
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        expected, size = reference(model, folders, x, at)
        found = layer(x) - layer.base_layer(x)
        bound = (layer.in_features + layer.r["default"] + 3) * torch.finfo(torch.float32).eps
        rounding = torch.finfo(torch.float32).eps * (layer(x).abs() + layer.base_layer(x).abs())  # of base and sum
        assert ((found - expected).abs() <= bound * size + rounding).all(), at
        assert found.abs().max() > 0.01


@pytest.mark.parametrize("settings", [{}, {"shape": "scalar", "shared": True}], ids=str)
def test_a_merge_is_one_stock_lora_with_equal_logits_and_a_cut_is_resizes(
    folders: dict[str, str], tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = over(folders, **settings)
    perturb(model)
    expected = logits(model)
    assert model.merge(tmp_path / "whole") == tmp_path / "whole"
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "whole")
    assert stock.peft_config["default"].peft_type == "LORA"
    assert torch.equal(logits(stock), expected)  # PEFT computes with the very factors that we do
    export_lora(model, tmp_path / "export")
    found, same = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "export"))
    assert found.keys() == same.keys()
    assert all(torch.equal(found[key], same[key]) for key in same)
    ranks = {name: layer.r["default"] for name, layer in layers_of(model).items()}
    assert {*ranks.values()} == {2 + 3 + 2, 2 + 3 + 1}
    # cut to any rank: as resize_adapter cuts the whole, by the same moments; measured of this model or of the whole
    batches = [{"input_ids": rows(4), "labels": rows(4)}]
    moments = adapter_moments(model, batches)
    model.merge(tmp_path / "cut", rank=2, moments=moments)
    resize_adapter(tmp_path / "whole", tmp_path / "by-hand", rank=2, moments=adapter_moments(stock, batches))
    model.merge(tmp_path / "plain", rank=2)
    cut, by_hand, plain = (
        logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / name)) for name in ("cut", "by-hand", "plain")
    )
    torch.testing.assert_close(cut, by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(cut, plain, atol=1e-3)
    # the saved adapter is read without its base model too
    model.save_pretrained(tmp_path / "saved")
    resize_adapter(tmp_path / "saved", tmp_path / "from-file", rank=7)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "from-file")), expected, rtol=1e-4, atol=1e-5
    )


def test_a_saved_adapter_needs_no_other_folder_and_its_rows_are_by_name(tmp_path: Path) -> None:
    """Loaded in another process, when the sources are gone; PEFT writes names in the order of the alphabet."""
    adapters = {name: lora(tmp_path / name, seed) for seed, name in enumerate(("z", "m", "a"))}
    model = over(adapters, shape="scalar", shared=True)
    perturb(model)
    model.save_pretrained(tmp_path / "saved")
    torch.save(logits(model), tmp_path / "expected.pt")
    for name in adapters:
        Path(adapters[name]).rename(tmp_path / f"gone-{name}")
    code = f"""
import torch
import peft_dynamic
from peft import PeftModel
from tests.tuners.common import tiny_llama
from tests.tuners.test_scalearn import logits
model = PeftModel.from_pretrained(tiny_llama(), {str(tmp_path / "saved")!r})
assert torch.equal(logits(model), torch.load({str(tmp_path / "expected.pt")!r}))
model = PeftModel.from_pretrained(tiny_llama(), {str(tmp_path / "saved")!r}, is_trainable=True)
assert model.get_nb_trainable_parameters()[0] == 3
"""
    script = tmp_path / "load.py"
    script.write_text(code)
    python(script)


def test_a_source_counts_in_its_own_modules_alone(tmp_path: Path) -> None:
    adapters = {"one": lora(tmp_path / "one", 1, target_modules=["q_proj"]), "two": lora(tmp_path / "two", 2)}
    model = over(adapters)
    assert model.get_nb_trainable_parameters()[0] == LAYERS * (2 * 32 + 16 + 32)
    shared = over(adapters, shape="scalar", shared=True)
    (omega,) = omegas(shared).values()
    with torch.no_grad():
        omega.copy_(torch.tensor([[5.0], [0.0]]))  # of the first alone
    expected = PeftModel.from_pretrained(tiny_llama(), adapters["one"])
    for layer in layers_of(shared).values():
        layer.lora_scales = nn.ModuleDict()
    for module in expected.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(5.0)
    torch.testing.assert_close(logits(shared), logits(expected), rtol=1e-5, atol=1e-6)


def test_the_start_is_near_omega_init_over_the_number_of_sources(folders: dict[str, str]) -> None:
    torch.manual_seed(0)
    drawn = torch.cat([omega.detach().flatten() for omega in omegas(over(folders)).values()])
    assert len(drawn) == 480
    assert drawn.mean().item() == pytest.approx(2 / 3, abs=5 * 0.001 / 480**0.5)
    assert drawn.std().item() == pytest.approx(0.001, rel=0.15)  # 4.6 deviations of it
    drawn = torch.cat([omega.detach().flatten() for omega in omegas(over(folders, omega_init=-6)).values()])
    assert drawn.mean().item() == pytest.approx(-2, abs=1e-3)


def test_dropout_is_of_whole_entries_of_omega_the_same_for_the_batch(folders: dict[str, str]) -> None:
    model = over(folders, omega_dropout=0.5).train()
    layer = next(iter(layers_of(model).values()))
    seen: list[torch.Tensor] = []
    layer.lora_B["default"].register_forward_hook(lambda module, args, output: seen.append(module.weight.detach()))
    torch.manual_seed(0)
    x = torch.randn(4, 3, layer.in_features)
    first, second = layer(x), layer(x)
    assert len(seen) == 2
    assert not torch.equal(first, second)
    with torch.no_grad():
        kept = layer.eval().lora_B["default"].weight
    sizes = [*layer.lora_views["default"].parts[1][2].of_rows.values()]
    assert sizes == [3, 2, 2]
    for weight in seen:  # each entry of omega, a row of a source's block, is 0 or twice itself
        dropped = 0
        for block, whole in zip(weight.split(sizes, 1), kept.split(sizes, 1), strict=True):
            gone = (block == 0).all(1)
            torch.testing.assert_close(block[~gone], 2 * whole[~gone])
            dropped += int(gone.sum())
        assert 20 < dropped < 76  # of 96
    assert torch.equal(layer(x), layer(x))  # in evaluation none, after training passes
    with torch.no_grad():  # nor in what a training pass without gradients has left behind
        layer.train()(x)
        model.eval()
        assert torch.equal(layer.lora_B["default"].weight, kept)
        model.train()
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(layer.lora_B["default"].weight, kept)


def test_checkpointing_draws_a_mask_once(folders: dict[str, str]) -> None:
    def gradients(reentrant: bool | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = over(folders, omega_dropout=0.5).train()
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(1)
        model(input_ids=rows(2), labels=rows(2)).loss.backward()
        return {name: omega.grad for name, omega in omegas(model).items()}

    expected = gradients(None)
    for reentrant in (True, False):
        found = gradients(reentrant)
        assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())


def test_a_head_is_trained_anew_and_those_of_the_sources_stay_out(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    def bert() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))

    def source(name: str, seed: int) -> str:
        return saved(bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), tmp_path / name, seed)

    adapters = {"one": source("one", 1), "two": source("two", 2)}
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "one/adapter_model.safetensors")
    model = get_peft_model(bert(), ScaLearnConfig(adapters=adapters, task_type="SEQ_CLS"))
    head = model.base_model.model.classifier
    assert torch.equal(head.modules_to_save["default"].weight, bert().classifier.weight)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition("model.")[2].partition(".")[0] for name in trained} == {"bert", "classifier"}
    ids = rows(4)
    loss = model.train()(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    assert head.modules_to_save["default"].weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(bert(), tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        # in a model that has the sources loaded, their heads are taken out too
        loaded = PeftModel.from_pretrained(bert(), adapters["one"], adapter_name="one")
        loaded.load_adapter(adapters["two"], "two")
        loaded = learn_scales(loaded, ["one", "two"])
        assert torch.equal(
            loaded.base_model.model.classifier.modules_to_save["default"].weight, bert().classifier.weight
        )
        assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
        model.merge(tmp_path / "out", rank=2)
        stock = PeftModel.from_pretrained(bert(), tmp_path / "out").eval()
        assert torch.equal(
            stock.base_model.model.classifier.modules_to_save["default"].weight, head.modules_to_save["default"].weight
        )


KINDS = {
    "dylora": DyLoRAConfig(r=4, ranks=[1, 2, 4], target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "dylora-paper": DyLoRAConfig.paper(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "moslora": MoSLoRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "loretta-rep": LorettaRepConfig(
        bottleneck=4,
        tensor_rank=2,
        tensor_shape=[8, 4, 4],
        target_modules=["q_proj"],
        train_layer_norms=False,
        task_type="CAUSAL_LM",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_counts_as_what_it_computes(kind: str, tmp_path: Path) -> None:
    """With omega = 1 and one source the model is the source; from its folder, and from a model that has it."""
    folder = saved(tiny_llama(), KINDS[kind], tmp_path / "source", 4)
    source = PeftModel.from_pretrained(tiny_llama(), folder, adapter_name="x")
    ranked = hasattr(source.base_model, "set_rank")
    if ranked:
        source.set_rank(2)
    expected = logits(source)
    ranks = {"source_ranks": {"x": 2}} if ranked else {}
    for model in (over({"x": folder}, **ranks), learn_scales(source, ["x"])):
        assert layers_of(model)["base_model.model.model.layers.0.self_attn.q_proj"].r["default"] == (2 if ranked else 4)
        with torch.no_grad():
            for omega in omegas(model).values():
                omega.fill_(1.0)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    # and a ScaLearn adapter may be a source itself
    model.save_pretrained(tmp_path / "again")
    again = over({"y": str(tmp_path / "again")}, shape="scalar", shared=True)
    with torch.no_grad():
        next(iter(omegas(again).values())).fill_(1.0)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


def test_what_a_source_trained_beside_its_factors_is_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = lora(tmp_path / "norms", 1, modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    with pytest.warns(UserWarning, match="'x'.* has trained .*trainable_tokens.* are left out"):
        ScaLearnConfig(adapters={"x": folder})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapters": {}}, "adapters={} is empty"),
        ({"adapters": ["a"]}, "adapters must be a dict from names to folders"),
        ({"adapters": {"a": "no/where/at/all"}}, "adapters\\['a'\\]: adapter='no/where/at/all' is no folder"),
        ({"shape": "matrix"}, "shape must be one of \\['vector', 'scalar'\\], got 'matrix'"),
        ({"shared": "yes"}, "shared must be True or False, got 'yes'"),
        ({"omega_init": 0}, "omega_init must be a finite number other than 0, got 0"),
        ({"omega_dropout": 1.0}, "omega_dropout must be a number from 0 to below 1, got 1.0"),
        ({"source_ranks": {"x": 2}}, "source_ranks={'x': 2} names 'x'"),
        ({"source_ranks": {"c": 1}}, "adapters\\['c'\\]: source_ranks has rank 1 for it, and it has one rank"),
        ({"shared": True}, "needs? equally many outputs.*16 in .*v_proj, 32 in .*"),
        ({"r": 4}, "r=4 is made from the sources"),
        ({"target_modules": ["q_proj"]}, "target_modules=.* is made from the sources"),
        ({"lora_alpha": 3}, "lora_alpha=3 is made from the sources"),
        ({"init_lora_weights": "gaussian"}, "does not support init_lora_weights='gaussian'"),
        ({"ensure_weight_tying": True}, "does not support ensure_weight_tying=True"),
        ({"use_dora": True}, "does not support use_dora=True: DoRA's magnitudes"),
        ({"use_rslora": True}, "does not support use_rslora=True: the scale of each source"),
        ({"exclude_modules": ["q_proj"]}, "does not support exclude_modules=.*leave them out of the sources"),
        ({"layer_replication": [[0, 1]]}, "does not support layer_replication"),
        ({"sources": {"q_proj": {"x": 2}}}, "sources names 'x', which is none of the adapters"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(folders: dict[str, str], settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=f"ScaLearnConfig.*{message}"):
        ScaLearnConfig(**({"adapters": folders} | settings))


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape:UserWarning")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"use_dora": True}, "use_dora=True: its magnitudes"), ({"lora_bias": True}, "lora_bias=True: it has a bias")],
    ids=str,
)
def test_a_source_that_is_more_than_a_product_is_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    folder = lora(tmp_path / "odd", 1, **fields)
    with pytest.raises(ValueError, match=f"adapters\\['odd'\\].*{reason}"):
        ScaLearnConfig(adapters={"odd": folder})
    model = PeftModel.from_pretrained(tiny_llama(), folder, adapter_name="odd")
    expected = logits(model)
    with pytest.raises(ValueError, match=reason):
        learn_scales(model, ["odd"])
    assert torch.equal(logits(model), expected)


def test_sources_of_other_models_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    config = ScaLearnConfig(adapters=folders, task_type="CAUSAL_LM")
    shallow = tiny_llama(layers=1)
    before = [*shallow.state_dict()]
    with pytest.raises(ValueError, match=r"the sources adapt model\.layers\.1\..* \(3 such\), which LlamaForCausalLM"):
        get_peft_model(shallow, config)
    assert [*shallow.state_dict()] == before
    wide = tiny_llama().config
    wide.num_key_value_heads = 4  # v_proj has 32 outputs then
    with pytest.raises(ValueError, match=r"a factor of shape \(16, 6\) at .*v_proj, and the model needs \(32, 6\)"):
        get_peft_model(type(tiny_llama())(wide), config)
    assert len(layers_of(get_peft_model(tiny_llama(), config))) == 6  # the configuration is as good as before
    for name, folder in folders.items():
        (tmp_path / name).mkdir()
        written = json.loads(Path(folder, "adapter_config.json").read_text()) | {"base_model_name_or_path": name}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(written))
        save_file(load_file(Path(folder, "adapter_model.safetensors")), tmp_path / name / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"is of the base model 'b', and .* of 'a'"):
        ScaLearnConfig(adapters={name: str(tmp_path / name) for name in "ab"})


def test_a_configuration_without_its_tensors_trains_nothing(folders: dict[str, str], tmp_path: Path) -> None:
    over(folders).save_pretrained(tmp_path)
    config = ScaLearnConfig.from_pretrained(str(tmp_path))
    model = get_peft_model(tiny_llama(), config)
    assert logits(model).isnan().all()
    with pytest.raises(RuntimeError, match=r"the adapter 'default' has none of its sources at '.*q_proj'"):
        model.train()(input_ids=rows(1), labels=rows(1))


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("one", TypeError, "names='one': must be a list"),
        ([], TypeError, "names=\\[\\]: must be a list of the model's adapters, \\['c'\\]"),
        (["c", "x"], ValueError, "the model has no adapter 'x', but \\['c'\\]"),
    ],
)
def test_learn_scales_refuses_by_name(
    folders: dict[str, str], names: Any, error: type[Exception], message: str
) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), folders["c"], adapter_name="c")
    with pytest.raises(error, match=message):
        learn_scales(model, names)
    with pytest.raises(TypeError, match="model is a LlamaForCausalLM, and must be a PeftModel"):
        learn_scales(tiny_llama(), ["c"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="model has a merged adapter"):
        learn_scales(model, ["c"])


def test_scales_learn_what_a_mixture_of_sources_does(folders: dict[str, str]) -> None:
    """A target that is 0.2 of one source and 1.4 of another, by scalars for all layers: found to a hundredth."""
    target = over(folders, shape="scalar", shared=True)
    (omega,) = omegas(target).values()
    with torch.no_grad():
        omega.copy_(torch.tensor([[0.2], [0.0], [1.4]]))
        wanted = target.eval()(input_ids=rows(16)).logits
    model = over(folders, shape="scalar", shared=True, omega_dropout=0.0)
    optimizer = torch.optim.LBFGS(omegas(model).values(), line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model.train()(input_ids=rows(16)).logits - wanted).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    (found,) = omegas(model).values()
    assert torch.allclose(found, omega, atol=0.01)
    assert trainable_state(model).keys() == omegas(model).keys()
