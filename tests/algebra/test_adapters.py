"""Resizing, merging and averaging of saved adapters; what comes out is read by PEFT alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_dynamic import DyLoRAConfig, LorettaRepConfig, average_adapters, merge_adapters, resize_adapter
from peft_dynamic.algebra.checkpoint import read_checkpoint
from peft_dynamic.algebra.inspect import energy_kept, energy_table
from tests import methods
from tests.conformance.cases import perturb
from tests.stock_cases import build
from tests.tuners.common import rows, tiny_llama

LORA: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
}


def saved(folder: Path, seed: int = 1, **settings: Any) -> Path:
    """A LoRA adapter of the tiny Llama with random values."""
    defaults = {"r": 8, "lora_alpha": 12, "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_llama(), LoraConfig(**(defaults | settings)))
    perturb(model, seed)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(tiny_llama(), folder).eval()(input_ids=rows(2)).logits


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """The update of each adapted module, as PEFT computes it."""
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("kind", LORA)
def test_the_full_rank_is_the_adapter_itself(kind: str, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", **LORA[kind])
    resize_adapter(str(whole), tmp_path / "same", rank=8)
    assert torch.equal(logits(tmp_path / "same"), logits(whole))
    for key, tensor in load_file(whole / "adapter_model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "same" / "adapter_model.safetensors")[key], tensor)


@pytest.mark.parametrize("kind", LORA)
def test_a_rank_is_the_best_approximation_of_each_module_s_update(kind: str, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", **LORA[kind])
    resize_adapter(whole, tmp_path / "small", rank=2)
    small = deltas(tmp_path / "small")
    assert small.keys() == deltas(whole).keys()
    for name, delta in deltas(whole).items():
        u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
        best = (u[:, :2] * s[:2]) @ v[:2]
        torch.testing.assert_close(small[name].double(), best, atol=2e-5, rtol=1e-4, msg=name)
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["rank_pattern"]) == ("LORA", 2, {})


@pytest.mark.parametrize("budget", [{"parameters": 0.25}, {"parameters": 600}, {"bytes": 3000}], ids=str)
def test_a_budget_is_kept_and_modules_may_be_left_out(budget: dict[str, Any], tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", **LORA["all linear"])
    before = read_checkpoint(whole)
    resize_adapter(whole, tmp_path / "small", **budget)
    small = read_checkpoint(tmp_path / "small")
    allowed = budget.get("bytes", 0) // 4 or budget["parameters"] * (before.size if "parameters" in budget else 1)
    if budget.get("parameters", 1) > 1:
        allowed = budget["parameters"]
    assert allowed - max(product.cost for product in before.products.values()) <= small.size <= allowed
    if allowed < before.size / 4:
        assert {*small.products} < {*before.products}  # some are left out
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "small")
    adapted = {name for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {*small.products}
    assert logits(tmp_path / "small").isfinite().all()


def test_a_dict_of_ranks_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", target_modules=["q_proj", "v_proj"])
    resize_adapter(whole, tmp_path / "small", rank={"q_proj": 3, r"layers\.1\..*v_proj": 0})
    small = read_checkpoint(tmp_path / "small").products
    assert {name.removeprefix("base_model.model.model."): product.rank for name, product in small.items()} == {
        "layers.0.self_attn.q_proj": 3,
        "layers.1.self_attn.q_proj": 3,
        "layers.0.self_attn.v_proj": 8,
    }


OURS = methods.configs(lora=True, task_type="CAUSAL_LM")


@pytest.mark.parametrize("method", OURS)
def test_adapters_of_ours_are_read_or_refused_by_name(method: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), OURS[method]())
    perturb(model)
    model.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = model.eval()(input_ids=rows(2)).logits
    if method == "loretta-rep":
        with pytest.raises(ValueError, match=r"has tensor_shape=None: .* write it with export_lora"):
            resize_adapter(tmp_path / "ours", tmp_path / "out", rank=4)
        assert not (tmp_path / "out").exists()
    else:
        resize_adapter(tmp_path / "ours", tmp_path / "out", rank=4)
        torch.testing.assert_close(logits(tmp_path / "out"), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"holds adapters of one type. Write it with export_lora"):
        resize_adapter(model, "small", rank=1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_weights": "noise_removal"},
        {"init_weights": "noise_removal", "use_rslora": True, "alpha_pattern": {"q_proj": 5}},
        {"rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj"], "bottleneck": 16},
        {"modules_to_save": ["lm_head"], "bias": "all"},
    ],
    ids=str,
)
def test_tensor_trains_whose_shape_is_given_are_read(settings: dict[str, Any], tmp_path: Path) -> None:
    """A shape with a product of 256 and a bottleneck of 8 is that of layers of 32 inputs and outputs."""
    defaults = {"bottleneck": 8, "tensor_rank": 3, "tensor_shape": [8, 4, 8], "target_modules": ["q_proj", "o_proj"]}
    if "rank_pattern" in settings:
        defaults["tensor_shape"] = [8, 4, 4]
    model = get_peft_model(tiny_llama(), LorettaRepConfig(**(defaults | {"task_type": "CAUSAL_LM"} | settings)))
    perturb(model)
    model.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    if settings.get("bias", "none") != "none":
        with pytest.raises(ValueError, match="does not tell the modules that they belong to"):
            resize_adapter(tmp_path / "ours", tmp_path / "out", rank=8)
        return
    most = max(product.rank for product in read_checkpoint(tmp_path / "ours").products.values())
    resize_adapter(tmp_path / "ours", tmp_path / "out", rank=most)
    with torch.no_grad():
        expected = model.eval()(input_ids=rows(2)).logits
    torch.testing.assert_close(logits(tmp_path / "out"), expected, atol=1e-5, rtol=1e-4)


def test_a_loaded_adapter_gets_a_smaller_one_beside_it(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), saved(tmp_path / "whole", target_modules=["q_proj", "v_proj"]))
    assert resize_adapter(model, "small", rank=2) == "small"
    resize_adapter(tmp_path / "whole", tmp_path / "small", rank=2)
    model.set_adapter("small")
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=rows(2)).logits, logits(tmp_path / "small"))
    with pytest.raises(ValueError, match="out='small' is an adapter of the model already"):
        resize_adapter(model, "small", rank=2)


def test_a_sum_is_that_of_the_updates_and_its_cut_the_best_one(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", 1, target_modules=["q_proj", "v_proj"], use_rslora=True, rank_pattern={"q_proj": 2})
    other = saved(tmp_path / "other", 2, target_modules=["q_proj", "down_proj"], lora_alpha=3, r=4)
    merge_adapters({str(one): 0.7, str(other): -0.3}, tmp_path / "sum")
    found, parts = deltas(tmp_path / "sum"), (deltas(one), deltas(other))
    assert found.keys() == parts[0].keys() | parts[1].keys()
    merge_adapters({str(one): 0.7, str(other): -0.3}, tmp_path / "small", rank=1)
    small = deltas(tmp_path / "small")
    for name, delta in found.items():
        wanted = 0.7 * parts[0].get(name, torch.zeros(())) - 0.3 * parts[1].get(name, torch.zeros(()))
        torch.testing.assert_close(delta, wanted, atol=1e-5, rtol=1e-4)
        u, s, v = torch.linalg.svd(wanted.double(), full_matrices=False)
        torch.testing.assert_close(small[name].double(), s[0] * torch.outer(u[:, 0], v[0]), atol=2e-5, rtol=1e-4)


def test_a_mean_is_that_of_the_products_and_of_what_was_trained_whole(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 2}
    folders = [saved(tmp_path / str(seed), seed, **settings) for seed in (1, 2, 3)]
    average_adapters(folders, tmp_path / "mean", rank=6)
    for name, delta in deltas(tmp_path / "mean").items():
        wanted = sum(deltas(folder)[name] for folder in folders) / 3
        torch.testing.assert_close(delta, wanted, atol=1e-5, rtol=1e-4)
    heads = [load_file(folder / "adapter_model.safetensors")["base_model.model.lm_head.weight"] for folder in folders]
    mean = load_file(tmp_path / "mean" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    torch.testing.assert_close(mean, torch.stack(heads).mean(0))
    average_adapters(folders, tmp_path / "as the first")
    assert {product.rank for product in read_checkpoint(tmp_path / "as the first").products.values()} == {2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_stay_what_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", target_modules=["q_proj"])
    path = whole / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    resize_adapter(whole, tmp_path / "small", rank=3)
    assert {tensor.dtype for tensor in load_file(tmp_path / "small" / "adapter_model.safetensors").values()} == {dtype}
    for name, delta in deltas(tmp_path / "small").items():
        u, s, v = torch.linalg.svd(deltas(whole)[name].double(), full_matrices=False)
        best = (u[:, :3] * s[:3]) @ v[:3]
        assert (delta.double() - best).abs().max() <= 0.02 * best.abs().max()


@pytest.mark.parametrize("layers", ["convolutions", "transposed", "bias"])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_other_layers(layers: str, tmp_path: Path) -> None:
    from tests.stock_cases import CASES

    base, inputs = build(layers)
    model = get_peft_model(base, LoraConfig(**({"r": 4, "lora_alpha": 6} | CASES[layers].config)))
    perturb(model)
    model.save_pretrained(tmp_path / "whole")
    resize_adapter(tmp_path / "whole", tmp_path / "same", rank=4)
    loaded = PeftModel.from_pretrained(build(layers)[0], tmp_path / "same").eval()
    with torch.no_grad():
        assert torch.equal(loaded(inputs), model.eval()(inputs))


@pytest.mark.parametrize("parameters", [0.3, 0.5, 0.7])
def test_an_attention_and_its_projection_keep_one_rank(parameters: float, tmp_path: Path) -> None:
    """PEFT gives the projection inside nn.MultiheadAttention the attention's rank, whatever `rank_pattern` says."""
    base, inputs = build("attention")
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["attention", "head"]))
    perturb(model)
    model.save_pretrained(tmp_path / "whole")
    resize_adapter(tmp_path / "whole", tmp_path / "small", parameters=parameters)
    ranks = {name.rpartition("model.")[2]: p.rank for name, p in read_checkpoint(tmp_path / "small").products.items()}
    assert ranks["attention"] == ranks["attention.base_layer.out_proj"]
    small = PeftModel.from_pretrained(build("attention")[0], tmp_path / "small").eval()
    with torch.no_grad():
        assert small(inputs).isfinite().all()


def broken(folder: Path, how: str) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(key for key in tensors if "lora_A" in key)
    if how == "no config":
        config.unlink()
    elif how == "pickle":
        torch.save(tensors, folder / "adapter_model.bin")
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:200])
    elif how == "not JSON":
        config.write_text("{")
    elif how in ("NaN", "no B", "misshapen"):
        if how == "NaN":
            tensors[first][0, 0] = float("nan")
        elif how == "no B":
            del tensors[first.replace("lora_A", "lora_B")]
        else:
            tensors[first] = tensors[first][:3].clone()
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        values = json.loads(config.read_text())
        odd = {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}, "ia3": {"peft_type": "IA3"}}
        values |= odd[how]
        config.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "has no adapter_config.json"),
        ("pickle", "adapter_model.bin is a pickle"),
        ("truncated", "is damaged"),
        ("not JSON", "cannot be read"),
        ("NaN", "NaN or infinite values in .*lora_A"),
        ("no B", "has .*lora_A.weight and no .*lora_B.weight"),
        ("misshapen", "has factors of shape"),
        ("dora", "has use_dora=True: its magnitudes"),
        ("pissa", "init_lora_weights='pissa', which changed the base weights"),
        ("ia3", "is a IA3 adapter, which is no product"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_written(how: str, message: str, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", target_modules=["q_proj"])
    other = saved(tmp_path / "other", target_modules=["q_proj"])
    broken(whole, how)
    calls: list[Callable[[], Any]] = [
        lambda: resize_adapter(whole, tmp_path / "out", rank=1),
        lambda: merge_adapters({str(other): 1.0, str(whole): 1.0}, tmp_path / "out"),
        lambda: average_adapters([other, whole], tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "pass one of rank, parameters and bytes, got none"),
        ({"rank": 2, "bytes": 10}, "got rank, bytes"),
        ({"rank": 0}, "rank=0: must be a whole number of at least 1"),
        ({"rank": 9}, "rank=9: must be at most 8, the largest rank"),
        ({"rank": "4"}, "rank='4': must be a whole number"),
        ({"rank": True}, "rank=True"),
        ({"rank": {"k_proj": 2}}, "match none"),
        ({"rank": {"q_proj": 9}}, r"rank\['q_proj'\]=9: must be a whole number from 0 to 8"),
        ({"rank": {"q_proj": 0}}, "no module would be left"),
        ({"parameters": 1.5}, "parameters=1.5: must be a share"),
        ({"parameters": float("nan")}, "parameters=nan"),
        ({"parameters": -3}, "parameters=-3"),
        ({"parameters": 1}, "no module would be left"),
        ({"bytes": 0.5}, "bytes=0.5"),
    ],
)
def test_bad_arguments_name_themselves(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", target_modules=["q_proj"])
    with pytest.raises((ValueError, TypeError), match=message):
        resize_adapter(whole, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_sums_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", target_modules=["q_proj"])
    head = saved(tmp_path / "head", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(TypeError, match="must be a dict from folders or names to weights"):
        merge_adapters([str(one)], tmp_path / "out")  # type: ignore[arg-type]  # what a user may do
    with pytest.raises(ValueError, match=r"the weight of .* must be a finite number, got nan"):
        merge_adapters({str(one): float("nan")}, tmp_path / "out")
    with pytest.raises(ValueError, match="has trained modules, biases or tokens beside its factors"):
        merge_adapters({str(one): 1.0, str(head): 1.0}, tmp_path / "out")
    with pytest.raises(ValueError, match=r"differ in base_model.model.lm_head.weight"):
        average_adapters([one, head], tmp_path / "out")
    with pytest.raises(ValueError, match="rank=0: must be a whole number"):
        merge_adapters({str(one): 1.0}, tmp_path / "out", rank=0)
    narrow = tmp_path / "narrow"
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(narrow)
    tensors = load_file(narrow / "adapter_model.safetensors")
    wide = {k: torch.zeros(v.shape[0], v.shape[1] + 1) if "lora_A" in k else v for k, v in tensors.items()}
    save_file(wide, narrow / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="of another shape"):
        merge_adapters({str(one): 1.0, str(narrow): 1.0}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_more_than_a_lora_is_not_written_over(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", target_modules=["q_proj"])
    get_peft_model(tiny_llama(), OURS["dylora"]()).save_pretrained(tmp_path / "ours")
    before = (tmp_path / "ours" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a DYLORA adapter"):
        resize_adapter(whole, tmp_path / "ours", rank=2)
    assert (tmp_path / "ours" / "adapter_model.safetensors").read_bytes() == before


def test_the_energy_of_each_rank_is_shown(tmp_path: Path) -> None:
    read = read_checkpoint(saved(tmp_path / "whole", target_modules=["q_proj"]))
    for module, kept in energy_kept(read).items():
        delta = deltas(tmp_path / "whole")[module]
        squares = torch.linalg.svdvals(delta.double()).square()[:8]
        expected = squares.cumsum(0) / squares.sum()
        torch.testing.assert_close(torch.tensor(kept, dtype=torch.float64), expected, atol=1e-6, rtol=1e-5)
    text = energy_table(read)
    assert text.startswith("LORA, 2 modules, largest rank 8, ")
    assert "100.0%" in text


def test_a_budget_counts_the_scale_of_each_module(tmp_path: Path) -> None:
    """Equal factors in all layers: the module whose alpha is larger gets all of a budget for one module."""
    model = get_peft_model(
        tiny_llama(),
        LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], alpha_pattern={r"layers\.1\..*": 20}),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.eye(*parameter.shape))
    model.save_pretrained(tmp_path / "whole")
    resize_adapter(tmp_path / "whole", tmp_path / "half", parameters=0.5)
    (name,) = read_checkpoint(tmp_path / "half").products
    assert "layers.1." in name
    assert torch.equal(deltas(tmp_path / "half")[name], deltas(tmp_path / "whole")[name])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("cap", [{}, {"q_proj": 3}], ids=["no cap", "a cap"])
@pytest.mark.parametrize("rule", ["alpha/r", "alpha/b", "alpha/sqrt(b)", "alpha/sqrt(r*b)"])
def test_dylora_s_rules_of_scale_are_read(rule: str, cap: dict[str, int], mixed: bool, tmp_path: Path) -> None:
    config = DyLoRAConfig(
        r=8,
        lora_alpha=12,
        scaling=rule,
        rank_pattern=dict(cap),
        alpha_pattern={"v_proj": 5},
        use_mixer=mixed,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny_llama(), config)
    perturb(model)
    model.save_pretrained(tmp_path / "ours")
    resize_adapter(tmp_path / "ours", tmp_path / "stock", rank=8)
    with torch.no_grad():
        expected = model.eval()(input_ids=rows(2)).logits
    torch.testing.assert_close(logits(tmp_path / "stock"), expected, atol=1e-5, rtol=1e-4)


def test_a_name_that_nobody_has_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(name: str, **kwargs: object) -> str:
        raise ConnectionError(f"no {name}\nand more lines")

    monkeypatch.setattr("peft_dynamic.algebra.checkpoint.snapshot_download", download)
    monkeypatch.chdir(tmp_path)  # where no such file lies about
    with pytest.raises(FileNotFoundError, match=r"'runs/sql' is no folder here, .*ConnectionError: no runs/sql\)"):
        resize_adapter("runs/sql", tmp_path / "out", rank=2)
