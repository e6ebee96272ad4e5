"""Decoding that skips inactive neurons gives what the dense model gives, and skips what it says."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_dynamic.density.sparse as sparse_module
from peft_dynamic import DensityLoRAConfig, measure_density, sparse_inference
from tests.density.models import build, perturbed, with_lora

# Family -> the ends of its down-projection and, in a gated block, of the one whose rows are skipped too
SHAPES = {
    "OPT": ("fc2", None),
    "Llama": ("mlp.down_proj", "up_proj"),
    "GPT2": ("mlp.c_proj", None),
    "T5": ("DenseReluDense.wo", None),
    "T5 gated": ("DenseReluDense.wo", "wi_1"),
    "Bart": ("fc2", None),
}


def with_relu(model: Any) -> Any:
    """With a ReLU for its activation, and weights at which a wrong neuron is seen in the logits."""
    for parent in list(model.modules()):
        for name, _ in list(parent.named_children()):
            if name in ("act", "act_fn", "activation_fn"):
                setattr(parent, name, nn.ReLU())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif parameter.dim() == 2 and "lora" not in name:
                parameter.mul_(5)
    return model.eval()


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def call(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **decoder).logits


def activations(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name of each ReLU -> its output."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: found.update({name: output.clone()}))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.ReLU)
    ]
    call(model, tokens)
    for handle in handles:
        handle.remove()
    return found


def spoil(model: Any, family: str, active: dict[str, torch.Tensor]) -> None:
    """Make the weights of inactive neurons NaN: a product that reads them shows it."""
    down, up = SHAPES[family]
    for name, layer in model.named_modules():
        a = [value for key, value in active.items() if name.startswith(key.rpartition(".")[0] + ".")]
        if not (name.endswith(down) or (up and name.endswith(up))):
            continue
        assert len(a) == 1
        off = a[0].flatten() == 0
        assert 0 < off.sum() < len(off)
        by_neuron = layer.weight.data if family == "GPT2" or (up and name.endswith(up)) else layer.weight.data.t()
        by_neuron[off] = torch.nan


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_single_token_reads_the_weights_of_active_neurons_alone(family: str, dtype: torch.dtype) -> None:
    model = with_relu(build(family)).to(dtype)
    expected, active = call(model, ids(1, 1)), activations(model, ids(1, 1))
    with sparse_inference(model, max_density=1.0) as sparse:
        prompt = call(model, ids(1, 5))  # finds the projections
        spoil(model, family, active)
        found = call(model, ids(1, 1))
        assert call(model, ids(1, 5)).isnan().all(), "five tokens at once are computed from all neurons"
    assert_close(found.float(), expected.float(), 1e-5 if dtype == torch.float32 else 4e-2)
    assert prompt.isfinite().all()
    layers = 2 if family in ("OPT", "Llama", "GPT2") else 4
    assert [row.gated for row in sparse.layers] == [SHAPES[family][1] is not None] * layers
    assert [(row.sparse_tokens, row.dense_tokens) for row in sparse.layers] == [(1, 0)] * layers


def test_zero_active_neurons_leave_the_bias() -> None:
    model = with_relu(build("OPT"))
    for name, parameter in model.named_parameters():
        if name.endswith("fc1.bias"):
            parameter.data.fill_(-1e4)
    expected = call(model, ids(1, 1))
    with sparse_inference(model, max_density=0.5) as sparse:
        call(model, ids(1, 5))
        assert_close(call(model, ids(1, 1)), expected)
    assert [row.density for row in sparse.layers] == [0, 0]
    assert [row.sparse_tokens for row in sparse.layers] == [1, 1]


@pytest.mark.parametrize("family", ["OPT", "Llama"])
def test_a_threshold_sets_small_activations_to_zero_in_prompts_and_single_tokens_alike(family: str) -> None:
    model = with_relu(build(family))
    tokens = ids(1, 6)
    threshold = float(torch.cat([a.flatten() for a in activations(model, tokens).values()]).quantile(0.8))
    plain = call(model, tokens)

    handles = [
        layer.register_forward_hook(lambda _, __, output: torch.where(output.abs() > threshold, output, 0.0))
        for layer in model.modules()
        if isinstance(layer, nn.ReLU)
    ]
    expected = call(model, tokens)
    for handle in handles:
        handle.remove()
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max()  # so the threshold is seen

    above = measure_density(model, [tokens], threshold=threshold).rows[0].above
    with sparse_inference(model, threshold=threshold, max_density=1.0) as sparse, torch.no_grad():
        assert_close(call(model, tokens), expected)
        assert sparse.layers[0].density == pytest.approx(above)
        past, single = None, []
        for i in range(tokens.shape[1]):
            output = model(input_ids=tokens[:, i : i + 1], past_key_values=past, use_cache=True)
            past = output.past_key_values
            single.append(output.logits)
        assert_close(torch.cat(single, dim=1), expected, 1e-4)
        assert [row.sparse_tokens for row in sparse.layers] == [6, 6]
        assert measure_density(model, [tokens], threshold=0).rows[0].exact == pytest.approx(above)
    assert_close(call(model, tokens), plain)


def test_a_negative_activation_beyond_the_threshold_stays() -> None:
    model = with_relu(build("OPT"))
    for layer in model.model.decoder.layers:
        layer.activation_fn = nn.GELU().eval()
    tokens, kept = ids(1, 6), []

    def cut(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        kept.append(bool((output < -0.05).any()))
        return torch.where(output.abs() > 0.05, output, 0.0)

    handles = [layer.activation_fn.register_forward_hook(cut) for layer in model.model.decoder.layers]
    expected = call(model, tokens)
    for handle in handles:
        handle.remove()
    assert kept == [True, True]
    with sparse_inference(model, threshold=0.05, max_density=1.0):
        assert_close(call(model, tokens), expected)


@pytest.mark.parametrize("biased", [False, True])
def test_some_rows_are_those_of_the_linear_layer(biased: bool) -> None:
    layer, x, neurons = nn.Linear(3, 5, bias=biased), torch.randn(1, 1, 3), torch.tensor([1, 4])
    expected = torch.zeros(1, 1, 5)
    expected[..., neurons] = layer(x)[..., neurons].detach()
    with torch.no_grad():
        assert_close(sparse_module.some_rows(x, neurons, layer.weight, layer.bias), expected)


def test_an_activation_of_exactly_the_threshold_is_inactive() -> None:
    model = with_relu(build("OPT"))
    active = activations(model, ids(1, 1))
    a = next(iter(active.values()))
    value = float(a[a > 0].median())
    with sparse_inference(model, threshold=value, max_density=1.0) as sparse:
        call(model, ids(1, 1))
    assert sparse.layers[0].density == float((a > value).float().mean())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["LoRA", "DensityLoRA", "DoRA"])
def test_adapters_are_computed_whole(kind: str, merged: bool) -> None:
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = DensityLoRAConfig(**settings) if kind == "DensityLoRA" else LoraConfig(use_dora=kind == "DoRA", **settings)
    model = perturbed(get_peft_model(with_relu(build("Llama")), config)).eval()
    if merged:
        model.merge_adapter()
    expected = call(model, ids(1, 1))
    with sparse_inference(model, max_density=1.0) as sparse:
        call(model, ids(1, 5))
        assert_close(call(model, ids(1, 1)), expected)
        with model.disable_adapter():
            without = call(model, ids(1, 1))
    assert [row.sparse_tokens for row in sparse.layers] == [2, 2]
    assert [row.gated for row in sparse.layers] == [True, True]
    with model.disable_adapter():
        assert_close(without, call(model, ids(1, 1)))
    assert (without - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_in_between_is_followed(safe: bool) -> None:
    """The sparse path reads the weights themselves, not a copy of them."""
    model = with_lora("OPT").eval()
    with_relu(model)
    with sparse_inference(model, max_density=1.0) as sparse:
        before = call(model, ids(1, 5))
        assert_close(call(model, ids(1, 1)), before[:, :1])
        model.merge_adapter(safe_merge=safe)
        assert_close(call(model, ids(1, 1)), before[:, :1])
        model.base_model.model.model.decoder.layers[0].fc2.base_layer.weight.data *= 3.0
        changed = call(model, ids(1, 1))
    assert (changed - before[:, :1]).abs().max() > 0.01 * before.abs().max()
    assert_close(call(model, ids(1, 1)), changed)
    assert all(row.sparse_tokens + row.dense_tokens == 3 for row in sparse.layers)


@pytest.mark.parametrize("family", ["OPT", "T5 gated"])
@pytest.mark.parametrize("peft", [False, True])
def test_generation_gives_the_same_tokens(family: str, peft: bool) -> None:
    model = with_relu(with_lora(family) if peft else build(family))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = model.generate(input_ids=ids(1, 7), **settings)
    with sparse_inference(model, max_density=1.0) as sparse:
        found = model.generate(input_ids=ids(1, 7), **settings)
    assert torch.equal(found, expected)
    assert len(set(expected[0].tolist())) > 3
    decoder = [row for row in sparse.layers if "encoder" not in row.name]
    assert [row.sparse_tokens for row in decoder] == [11, 11]
    two = ids(2, 7)
    expected = model.generate(input_ids=two, **settings)
    with sparse_inference(model, max_density=1.0) as sparse:
        assert torch.equal(model.generate(input_ids=two, **settings), expected)
    assert not any(row.sparse_tokens for row in sparse.layers)


@pytest.mark.parametrize("family", SHAPES)
def test_the_model_is_given_back_as_it_was(family: str) -> None:
    model = with_relu(build(family))
    state = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    hooks = sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.modules())
    sparse = sparse_inference(model, max_density=1.0)
    call(model, ids(1, 5))
    assert any("forward" in vars(layer) for layer in model.modules())
    sparse.detach()
    sparse.detach()
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.modules()) == hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name][0])
        assert value.stride() == state[name][1]


def test_a_dense_model_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_module, "break_even", lambda *_: 0.5)
    model = build("Llama").eval()  # SiLU: nothing is 0
    expected = call(model, ids(1, 1))
    with sparse_inference(model) as sparse:
        call(model, ids(1, 5))
        assert torch.equal(call(model, ids(1, 1)), expected)
        assert not any("forward" in vars(layer) for layer in model.modules())
    assert [(row.used, row.density, row.break_even) for row in sparse.layers] == [(False, 1.0, 0.5)] * 2


def test_a_token_above_the_break_even_is_dense() -> None:
    model = with_relu(build("OPT"))
    shares = [float((a != 0).float().mean()) for a in activations(model, ids(1, 5)).values()]
    token = next(
        ids(1, 1, seed=seed)
        for seed in range(100)
        if all(
            (a != 0).float().mean() > share + 0.02
            for a, share in zip(activations(model, ids(1, 1, seed=seed)).values(), shares, strict=True)
        )
    )
    expected = call(model, token)
    with sparse_inference(model, max_density=max(shares)) as sparse:
        call(model, ids(1, 5))
        assert [row.used for row in sparse.layers] == [True, True]
        assert_close(call(model, token), expected)
    densest = shares.index(max(shares))
    assert (sparse.layers[densest].sparse_tokens, sparse.layers[densest].dense_tokens) == (0, 1)


@pytest.mark.parametrize("family", ["OPT", "Llama"])  # the input of Llama's up-projection is float32 under autocast
def test_gradients_and_autocast_take_the_dense_path(family: str) -> None:
    model = with_relu(build(family))
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(model, ids(1, 1))
    with sparse_inference(model, max_density=1.0) as sparse:
        call(model, ids(1, 5))
        model(input_ids=ids(1, 1), labels=ids(1, 1)).logits.sum().backward()
        assert [row.sparse_tokens for row in sparse.layers] == [0, 0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(model, ids(1, 1)), expected)


def test_a_break_even_is_measured_on_a_wide_layer() -> None:
    """At a density of 2 % it has 50 times less to read; not a matter of the machine."""
    assert sparse_module.break_even(4096, 512, torch.float32) >= 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -1.0}, "threshold must be a number of at least 0, got -1.0"),
        ({"threshold": float("nan")}, "threshold must be a number"),
        ({"max_density": 1.5}, "max_density must be a number from 0 to 1 or None to measure it, got 1.5"),
        ({"activation_modules": "nothing"}, "activation_modules='nothing' matches no module"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_inference(build("OPT").eval(), **settings)


def test_models_that_it_cannot_serve_are_refused() -> None:
    with pytest.raises(ValueError, match="eval mode"):
        sparse_inference(build("OPT"))
    model = with_relu(build("OPT"))
    with sparse_inference(model, max_density=1.0):
        call(model, ids(1, 5))
        with pytest.raises(ValueError, match="another sparse_inference"):
            sparse_inference(model)
        with pytest.raises(RuntimeError, match="training mode"):
            model.train()(input_ids=ids(1, 5))
    with pytest.raises(ValueError, match="on a CPU"):
        sparse_inference(build("OPT").eval().to("meta"))


def test_quantised_layers_are_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = build("OPT").eval()
    layer = model.model.decoder.layers[0]
    layer.fc2 = bitsandbytes.nn.Linear4bit(48, 32, quant_type="nf4")
    with pytest.raises(ValueError, match="has a Linear4bit"):
        sparse_inference(model)


def test_activations_that_no_linear_layer_reads_are_refused_and_the_model_is_free_again() -> None:
    model = with_relu(build("OPT"))
    for layer in model.model.decoder.layers:
        layer.fc2.register_forward_pre_hook(lambda _, args: (args[0] * 2,))  # as a block that scales them
    with sparse_inference(model), pytest.raises(RuntimeError, match="is the input of a linear layer"):
        call(model, ids(1, 5))
    assert not any("forward" in vars(layer) for layer in model.modules())
