"""LoRETTA_rep: published parameter counts, its starts, export, every refusal; the rest is in the conformance table."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_dynamic import LorettaRepConfig, export_lora
from tests.conformance.cases import perturb
from tests.processes import python
from tests.stock_cases import build, compute
from tests.tuners.common import losses


def trainable(model: nn.Module) -> int:
    """Parameters that are trained, without the last layer of the classifier."""
    last = ("out_proj", "classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return sum(p.numel() for name, p in named if last[0] not in name and not name.endswith(last[1:]))


@pytest.mark.parametrize(("rank", "count"), [(2, 42_072), (5, 54_228), (10, 95_288), (20, 255_408)])
def test_the_published_counts_of_deberta_base(rank: int, count: int) -> None:
    """12 fused in_proj (768 -> 8 -> 2304), 25 layer norms and the pooler: 0.042, 0.054, 0.094 and 0.250 M published."""
    config = DebertaConfig(
        vocab_size=50265,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        type_vocab_size=0,
        position_biased_input=False,
    )
    with torch.device("meta"):
        model = DebertaForSequenceClassification(config)
    adapter = LorettaRepConfig(tensor_rank=rank, target_modules=["in_proj"], task_type="SEQ_CLS")
    assert trainable(get_peft_model(model, adapter, low_cpu_mem_usage=True)) == count


def test_the_published_counts_of_roberta_base_and_llama_2() -> None:
    """0.07 M with query and value, norms and classifier.dense; 0.51 M with q_proj and v_proj and 65 RMS norms."""
    with torch.device("meta"):
        roberta = RobertaForSequenceClassification(
            RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        )
        llama = LlamaForCausalLM(LlamaConfig())  # its defaults are LLaMA-2-7B's sizes
    adapter = LorettaRepConfig(target_modules=["query", "value"], task_type="SEQ_CLS")
    assert trainable(get_peft_model(roberta, adapter, low_cpu_mem_usage=True)) == 68_088
    adapter = LorettaRepConfig(tensor_rank=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    assert trainable(get_peft_model(llama, adapter, low_cpu_mem_usage=True)) == 516_096


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bottleneck": 0}, ValueError, "bottleneck must be at least 1, got 0"),
        ({"bottleneck": 2.0}, TypeError, "bottleneck must be an int, got 2.0"),
        ({"tensor_rank": True}, TypeError, "tensor_rank must be an int, got True"),
        ({"tensor_shape": [128]}, ValueError, "at least two factors"),
        ({"tensor_shape": [4, 0]}, ValueError, "each at least 1, got \\[4, 0\\]"),
        ({"tensor_shape": "4,4"}, TypeError, "tensor_shape must be a list of ints or None, got '4,4'"),
        ({"tensor_shape": [7, 5]}, ValueError, "35, the product of \\[7, 5\\], is no multiple of bottleneck=8"),
        ({"r": 4}, ValueError, "r=4 and bottleneck=8 mean the same and differ. Pass bottleneck alone"),
        ({"init_weights": "zero"}, ValueError, "init_weights must be one of .* got 'zero'"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights='pissa'.*Pass init_weights"),
        ({"use_dora": True}, ValueError, "does not support use_dora=True"),
        ({"target_parameters": ["experts.up"]}, ValueError, "does not support target_parameters"),
        ({"lora_alpha": "big"}, ValueError, "lora_alpha must be a finite number, got 'big'"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LorettaRepConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"target_modules": ["a"], "tensor_shape": [4, 8, 8]},
            "lora_A of Linear\\(16, 32\\): .* must multiply to 16 x 8",
        ),
        ({"target_modules": ["a"], "tensor_rank": 99}, "tensor_rank=99 is above 8, the largest rank"),
        ({"target_modules": ["a", "emb"]}, "target_modules must be linear layers, and one is a Embedding"),
    ],
)
def test_what_does_not_fit_a_layer_is_refused_and_nothing_is_left(arguments: dict, message: str) -> None:
    base, inputs = build("linear")
    expected, names = compute(base, inputs), [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, LorettaRepConfig(**arguments))
    assert [name for name, _ in base.named_modules()] == names
    assert torch.equal(compute(base, inputs), expected)


def test_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="target_modules must be linear layers, and one is a Conv1d"):
        get_peft_model(build("convolutions")[0], LorettaRepConfig(target_modules=["c1"]))


def test_the_start_of_each_init() -> None:
    base, inputs = build("llama")
    expected = compute(base, inputs)
    arguments = {"target_modules": ["q_proj", "v_proj"], "tensor_rank": 3}
    for init, close in ((True, 0.0), ("noise_removal", 1e-5), ("reference", None)):
        torch.manual_seed(0)
        model = get_peft_model(build("llama")[0], LorettaRepConfig(init_weights=init, **arguments)).eval()
        difference = (compute(model, inputs) - expected).abs().max()
        assert difference <= close if close is not None else difference > 1e-2


def test_training_moves_the_last_core_first_and_all_of_them_next() -> None:
    model, (_, inputs) = get_peft_model(build("llama")[0], LorettaRepConfig(target_modules=["q_proj"])), build("llama")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    moved = []
    for _ in range(2):
        before = [factor["default"].cores.detach().clone() for factor in (layer.lora_A, layer.lora_B)]
        model.train()(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = [factor["default"].cores.detach() for factor in (layer.lora_A, layer.lora_B)]
        moved.append([int((a != b).sum()) for a, b in zip(after, before, strict=True)])
    last = layer.lora_B["default"].view.sizes[-1]
    assert moved[0] == [0, last]
    assert moved[1][0] > 0.9 * after[0].numel()
    assert moved[1][1] > 0.9 * after[1].numel()


def test_layer_norms_and_the_classifier_are_trained_saved_and_given_back(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(config).eval()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    ids = torch.randint(3, 50, (2, 7))
    with torch.no_grad():
        expected = base(ids).logits
    model = get_peft_model(
        base, LorettaRepConfig(tensor_rank=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    perturb(model)
    model.eval()
    norms = [name for name, p in model.named_parameters() if p.requires_grad and "LayerNorm" in name]
    assert len(norms) == 2 * (1 + 2 * 2)
    with torch.no_grad():
        trained = model(ids).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(RobertaForSequenceClassification(config).eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)
        unloaded = model.unload()
        assert torch.equal(unloaded(ids).logits, expected)
    assert all(torch.equal(value, weights[name]) for name, value in unloaded.state_dict().items())


@pytest.mark.parametrize("init", [True, "noise_removal"])
def test_a_classifier_merges_and_exports(tmp_path: Path, init: bool | str) -> None:
    """Merged, the trained norms and classifier stay in the model; exported, a stock PEFT loads them."""
    config = RobertaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    ids = torch.randint(3, 50, (2, 7))
    adapter = LorettaRepConfig(
        target_modules=["query", "value"], task_type="SEQ_CLS", init_weights=init, bottleneck=4, tensor_rank=2
    )
    model = get_peft_model(base, adapter)
    perturb(model)
    model.eval()
    with torch.no_grad():
        expected = model(ids).logits
    export_lora(model, tmp_path / "lora")
    written = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert written["r"] == (4 if init is True else 8)
    assert written["lora_alpha"] / written["r"] == 4.0
    script = f"""
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import RobertaForSequenceClassification
base = RobertaForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "lora")!r}).eval()
with torch.no_grad():
    save_file({{"logits": model(torch.tensor({ids.tolist()})).logits}}, {str(tmp_path / "out.safetensors")!r})
assert not [name for name in sys.modules if name.startswith("peft_dynamic")]
"""
    python("-c", script)
    stock = load_file(tmp_path / "out.safetensors")["logits"]
    # the classifier's train is applied in two thin products here and as one matrix there: rounding
    assert torch.allclose(stock, expected, atol=1e-5 * expected.abs().max().item())
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4 * expected.abs().max().item())
    assert type(merged.classifier.dense) is nn.Linear
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        again = RobertaForSequenceClassification.from_pretrained(tmp_path / "merged").eval()(ids).logits
    assert torch.allclose(again, expected, atol=1e-4 * expected.abs().max().item())


def test_adapters_cannot_be_combined_and_say_how() -> None:
    model = get_peft_model(build("linear")[0], LorettaRepConfig(target_modules=["a"]))
    with pytest.raises(NotImplementedError, match="export_lora"):
        model.add_weighted_adapter(["default"], [1.0], "both")


@given(sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)), bottleneck=st.integers(1, 12), rank=st.integers(1, 12))
def test_every_size_works_or_is_refused_with_the_largest_rank(
    sizes: tuple[int, int], bottleneck: int, rank: int
) -> None:
    base = nn.Sequential(nn.Linear(*sizes))
    x = torch.randn(3, sizes[0])
    expected = base(x)
    config = LorettaRepConfig(bottleneck=bottleneck, tensor_rank=rank, target_modules=["0"])
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        if "is above" not in str(error):  # the refusal says up to which rank
            raise
        return
    assert torch.equal(model(x), expected)


@pytest.mark.model("minilm")
def test_minilm_learns(model_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(model_path)
    model = get_peft_model(base, LorettaRepConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    ids, labels = torch.randint(1000, 2000, (8, 12)), torch.tensor([0, 1] * 4)
    found = losses(model, 30, 5e-3, input_ids=ids, labels=labels)
    assert found[-1] < 0.5 * found[0]


@pytest.mark.model("smollm2")
def test_smollm2_in_low_precision_with_noise_removal(model_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    ids = torch.randint(0, 1000, (2, 16))
    with torch.no_grad():
        expected = base(ids).logits.float()
    config = LorettaRepConfig(target_modules=["q_proj", "v_proj"], init_weights="noise_removal", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {
        torch.float32,
        torch.bfloat16,
    }  # norms are whole
    with torch.no_grad():
        assert (model(ids).logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    found = losses(model, 4, 3e-3, input_ids=ids, labels=ids)
    assert found[-1] < found[0]


def test_an_export_holds_nothing_of_an_adapter_whose_name_begins_alike(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["query"], "task_type": "SEQ_CLS", "bottleneck": 4, "tensor_rank": 2}
    model = get_peft_model(base, LorettaRepConfig(**settings), adapter_name="x1")
    perturb(model)
    model.add_adapter("x12", LorettaRepConfig(**settings))
    model.set_adapter("x12")
    perturb(model, seed=2)
    for name in ("x1", "x12"):
        model.set_adapter(name)
        with torch.no_grad():
            expected = model.eval()(torch.arange(3, 10)[None]).logits
            export_lora(model, tmp_path / name, adapter_name=name)
            fresh = RobertaForSequenceClassification.from_pretrained(tmp_path / "base").eval()
            stock = PeftModel.from_pretrained(fresh, tmp_path / name)(torch.arange(3, 10)[None]).logits
        torch.testing.assert_close(stock, expected, rtol=1e-4, atol=1e-5)
    one, two = (set(load_file(tmp_path / name / "adapter_model.safetensors")) for name in ("x1", "x12"))
    assert one == two


@pytest.mark.parametrize("init", [True, "noise_removal"])
def test_a_rank_stabilised_scale_is_exported(tmp_path: Path, init: bool | str) -> None:
    def base() -> RobertaForSequenceClassification:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        return RobertaForSequenceClassification(RobertaConfig(vocab_size=50, **sizes)).eval()

    settings = {"target_modules": ["query"], "task_type": "SEQ_CLS", "bottleneck": 4, "tensor_rank": 2}
    model = get_peft_model(base(), LorettaRepConfig(use_rslora=True, init_weights=init, **settings))
    perturb(model)
    ids = torch.arange(3, 10)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        export_lora(model, tmp_path)
        stock = PeftModel.from_pretrained(base(), tmp_path)(ids).logits
    torch.testing.assert_close(stock, expected, rtol=1e-4, atol=1e-5)
