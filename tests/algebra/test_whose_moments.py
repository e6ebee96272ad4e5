"""Whose moments they are: those of other factors are refused, where the shapes would let them through."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peft_dynamic import AdapterMoments, DyLoRAConfig, adapter_moments, merge_adapters, rank_curve, resize_adapter
from peft_dynamic.tuners.moments import mark_of
from tests.conformance.cases import perturb
from tests.tuners.common import tiny_llama

OTHER = "measured with other factors of .*_proj: of another adapter, or before it was trained on"


def adapted(base: Any = None, seed: int = 0, **settings: Any) -> Any:
    config = LoraConfig(**({"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings))
    model = get_peft_model(tiny_llama() if base is None else base, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
    return model.eval()


def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (2, 7))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]


@pytest.mark.parametrize("kept", [False, True])
def test_moments_of_another_adapter_of_the_same_shape_are_refused(tmp_path: Path, kept: bool) -> None:
    one, other = adapted(), adapted(seed=1)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    mine, theirs = (adapter_moments(model, batches()) for model in (one, other))
    if kept:
        mine, theirs = (AdapterMoments.load(m.save(tmp_path / f"{n}.moments")) for n, m in enumerate((mine, theirs)))
    with pytest.raises(ValueError, match=OTHER):
        resize_adapter(tmp_path / "one", tmp_path / "out", rank=2, moments=theirs)
    both = {str(tmp_path / "one"): mine, str(tmp_path / "other"): mine}
    with pytest.raises(ValueError, match=OTHER):
        merge_adapters(dict.fromkeys(both, 0.5), tmp_path / "out", rank=2, moments=both)
    with pytest.raises(ValueError, match=OTHER):
        resize_adapter(one, "small", rank=2, moments=theirs)
    with pytest.raises(ValueError, match=OTHER):
        rank_curve(one, lambda model: {"loss": 1.0}, ranks=[2], moments=theirs)
    assert not (tmp_path / "out").exists()
    resize_adapter(tmp_path / "one", tmp_path / "out", rank=2, moments=mine)


def test_moments_from_before_more_training_are_refused(tmp_path: Path) -> None:
    model = adapted()
    moments = adapter_moments(model, batches())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(**batches()[0]).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "later")
    with pytest.raises(ValueError, match=OTHER):
        resize_adapter(tmp_path / "later", tmp_path / "out", rank=2, moments=moments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_in_short_floats_is_of_the_adapter_that_was_measured(tmp_path: Path, dtype: torch.dtype) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "one")
    file = tmp_path / "one" / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    resize_adapter(tmp_path / "one", tmp_path / "out", rank=2, moments=adapter_moments(model, batches()))


def test_a_lower_rank_of_dylora_has_moments_of_its_own(tmp_path: Path) -> None:
    """Measured at rank r they are of the adapter whatever rank is set when they are used."""
    model = get_peft_model(tiny_llama(), DyLoRAConfig(r=4, ranks=[1, 2, 4], target_modules=["q_proj"]))
    perturb(model)
    moments = adapter_moments(model.eval(), batches())
    model.set_rank(2)
    rank_curve(model, lambda model: {"loss": 1.0}, ranks=[1, 2], moments=moments)
    model.set_rank(4)
    perturb(model)
    with pytest.raises(ValueError, match=OTHER):
        rank_curve(model, lambda model: {"loss": 1.0}, ranks=[1, 2], moments=moments)


def test_factors_that_are_not_here_have_no_mark_and_are_let_through() -> None:
    """Offloaded, in parts, or of a convolution."""
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    mark = mark_of(a, b)
    assert mark is not None
    there = AdapterMoments({}, {}, 1, {"q": mark})
    assert there.may_be_of("q", a, b)
    assert not there.may_be_of("q", a, -b)
    for one, other in ((a.to("meta"), b), (a[:0], b), (torch.ones(2, 3, 1, 1), b)):
        assert mark_of(one, other) is None
        assert there.may_be_of("q", one, other)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_moments_over_a_quantised_base_by_hand(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path / "base")  # packed by blocks of 64
    how = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.float32)
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how))
    seen: dict[str, torch.Tensor] = {}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    handles = [
        layer.register_forward_hook(lambda _, args, output, name=name: seen.update({name: args[0].detach()}))
        for name, layer in layers.items()
    ]
    found = adapter_moments(model, batches())
    for handle in handles:
        handle.remove()
    assert found.inputs.keys() == found.losses.keys() == seen.keys()
    for name, x in seen.items():
        weight = layers[name].lora_A["default"].weight
        z = (x.flatten(0, 1).to(weight.dtype) @ weight.mT).double()
        torch.testing.assert_close(found.inputs[name], z.mT @ z / len(z), rtol=1e-4, atol=1e-6)
        assert found.losses[name].diagonal().min() > 0


@pytest.mark.parametrize("name", ["user/name/rank-4", "https://huggingface.co/user/name", "user/name@main"])
def test_a_name_on_the_hub_has_no_path_in_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder and no name on the Hub"):
        resize_adapter(name, tmp_path / "out", rank=1)
