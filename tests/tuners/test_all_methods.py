"""What every tuner does in training: checkpointing, resuming, compiling, quantised bases, transformers' own methods."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from peft_dynamic import export_lora
from peft_dynamic.hosts.quantization import unpack_bnb_4bit
from tests.conformance.cases import perturb
from tests.tuners.common import rows, tiny_llama
from tests.tuners.methods import COMPILES_IN_PARTS, METHODS, OF_SOURCES, REFUSES_REENTRANT, methods_on, with_method

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to .-bit linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*kernels.*:UserWarning"),
]
every_method = pytest.mark.parametrize("method", METHODS)


def gradients(model: Any, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(input_ids=inputs, labels=inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@every_method
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(method: str, reentrant: bool) -> None:
    model = with_method(method)
    perturb(model)
    expected = gradients(model, rows(2))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant and method in REFUSES_REENTRANT:
        with pytest.raises(RuntimeError, match="use_reentrant"):
            gradients(model, rows(2))
        return
    found = gradients(model, rows(2))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())


@every_method
def test_a_resumed_trainer_equals_the_uninterrupted_one_bit_for_bit(method: str, tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in rows(16)]

    def trained(folder: str, resume: str | None = None) -> dict[str, torch.Tensor]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=3,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
        )
        torch.manual_seed(0)
        trainer = Trainer(with_method(method), arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}

    whole = trained("whole")
    again = trained("again", resume=str(tmp_path / "whole/checkpoint-3"))
    assert all(torch.equal(again[name], value) for name, value in whole.items())


# torch says this of its own resumed graphs, where a graph breaks at a tensor that is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@every_method
def test_compiled_training_equals_eager(method: str) -> None:
    eager, compiled = with_method(method, layers=1), with_method(method, layers=1)  # tracing takes seconds a layer
    for model in (eager, compiled):
        perturb(model)
        # an optimizer step, here an empty one, is when DyLoRA makes anew what a compiled pass takes for constant
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0).step()
    torch._dynamo.reset()
    expected = gradients(eager, rows(2))
    whole = method not in COMPILES_IN_PARTS  # without a graph break
    found = gradients(torch.compile(compiled, backend="eager", fullgraph=whole), rows(2))
    for name, value in expected.items():
        assert torch.allclose(found[f"_orig_mod.{name}"], value, atol=1e-5), name


def quantized(folder: Path, bits: int) -> Any:
    if bits == 4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
@every_method
def test_quantised_bases_train_after_an_evaluation_and_load_again(method: str, bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    wide = tiny_llama().config
    wide.hidden_size, wide.intermediate_size, wide.head_dim = 64, 128, 16  # bitsandbytes has blocks of 64
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "base")
    base = prepare_model_for_kbit_training(quantized(tmp_path / "base", bits), use_gradient_checkpointing=False)
    config = methods_on(partial(AutoModelForCausalLM.from_config, wide))[method]()
    model = get_peft_model(base, config)
    perturb(model)
    expected = {name for name, value in gradients(model, rows(2)).items() if value.abs().sum() > 0}
    model.eval()
    model.generate(input_ids=rows(2), max_new_tokens=3, do_sample=False)
    found = {name for name, value in gradients(model, rows(2)).items() if value.abs().sum() > 0}
    assert found == expected
    assert len(found) > 4
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        logits = model(input_ids=rows(2)).logits
        loaded = PeftModel.from_pretrained(quantized(tmp_path / "base", bits), tmp_path / "adapter")
        assert torch.allclose(loaded(input_ids=rows(2)).logits, logits, atol=1e-4)
        if method == "loretta-adp":
            return
        # merging rounds to so many bits; with the same factors in a stock LoRA it rounds to the same
        export_lora(model, tmp_path / "lora")
        stock = PeftModel.from_pretrained(quantized(tmp_path / "base", bits), tmp_path / "lora")
        unpack_bnb_4bit(stock)  # else bitsandbytes spoils its merged weights on some CPUs
        for each in (model, stock):
            each.merge_adapter()
        merged, expected_merged = (each(input_ids=rows(2)).logits for each in (model, stock))
    assert torch.allclose(merged, expected_merged, atol=1e-4)
    assert not torch.allclose(merged, logits, atol=1e-4)


@every_method
def test_transformers_own_adapter_methods(method: str, tmp_path: Path) -> None:
    model = with_method(method)
    perturb(model)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=rows(2)).logits
        base = tiny_llama().eval()
        base.load_adapter(str(tmp_path))
        assert torch.allclose(base(input_ids=rows(2)).logits, expected, atol=1e-6)
        base.disable_adapters()
        assert torch.allclose(base(input_ids=rows(2)).logits, tiny_llama().eval()(input_ids=rows(2)).logits, atol=1e-6)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in {"loretta-adp", *OF_SOURCES}])
@pytest.mark.parametrize("layers", [[[0, 2], [0, 2]], [[1, 2]]])
@pytest.mark.filterwarnings("ignore:.*layer_replication.*:UserWarning")
def test_replicated_layers_are_trained_saved_and_exported(method: str, layers: list, tmp_path: Path) -> None:
    config = METHODS[method]()
    config.layer_replication = layers
    model = get_peft_model(tiny_llama(), config)
    number = sum(end - start for start, end in layers)
    assert len(model.base_model.model.model.layers) == number
    perturb(model)
    grads = gradients(model, rows(2))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for layer in range(number):
        assert {name for name in trained if f".layers.{layer}." in name} <= grads.keys()
        assert any(f".layers.{layer}.self_attn.q_proj." in name for name in trained)
        assert any(f".layers.{layer}.input_layernorm." in name for name in trained) == method.startswith("loretta")
    if method == "density-lora":
        assert len(model.base_model.density["default"].layers) == number
    with torch.no_grad():
        expected = model.eval()(input_ids=rows(2)).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=rows(2)).logits, expected)
        export_lora(model, tmp_path / "lora")
        stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
        torch.testing.assert_close(stock(input_ids=rows(2)).logits, expected, rtol=1e-4, atol=1e-5)
