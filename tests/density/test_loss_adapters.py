"""The density loss under other adapters, and over quantised layers."""

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from peft_dynamic.density import calibrate_cut, cut_activations, measure_density
from tests import methods
from tests.density.models import (
    WEIGHT,
    assert_same,
    attached,
    batch_for,
    build,
    density_by_hand,
    gradients,
    perturbed,
    reference,
    task,
)

TASK = {"task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, Any] = {
    "LoRA": lambda: LoraConfig(r=4, target_modules="all-linear", **TASK),
    "IA3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "IA3 on the gate": lambda: IA3Config(target_modules=["gate_proj"], feedforward_modules=[], **TASK),
    **methods.configs("all-linear", own={"dylora": {"ranks": [4]}}, **TASK),
}
del ADAPTERS["density-lora"]  # it has this loss itself


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("before", [False, True], ids=["after", "before get_peft_model"])
def test_adapters(adapter: str, before: bool) -> None:
    config = ADAPTERS[adapter]()
    base, batch = build("Llama"), batch_for("Llama")
    density = attached(base) if before else None
    model = perturbed(get_peft_model(base, config))
    if density is None:
        density = attached(model)
    model(**batch).loss.backward()
    found = gradients(model)
    density.detach()
    assert_same(found, reference(model, "Llama", batch))


@pytest.mark.parametrize("family", ["Llama", "Bert", "T5"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_shift_the_mask(family: str, kind: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build(family), kind(num_virtual_tokens=3, task_type=task(family))).train()
    batch = batch_for(family)
    density = attached(model)
    model(**batch).loss.backward()
    found, value = gradients(model), float(density.value)
    density.detach()
    real = batch
    if kind is PromptTuningConfig:  # the virtual tokens pass through the feed-forward too, and count
        real = batch | {"attention_mask": torch.nn.functional.pad(batch["attention_mask"], (3, 0), value=1)}
    output, by_hand = density_by_hand(model, family, real, lambda: model(**batch))
    assert value == pytest.approx(float(by_hand.detach()), rel=1e-5)
    (output.loss + WEIGHT * by_hand).backward()
    assert_same(found, gradients(model))


def four_bit(folder: Any) -> Any:
    """A stock LoRA over a 4-bit Llama; on CPUs with AVX512-BF16 an evaluation would end its training."""
    pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tests.stock_cases import tiny_llama

    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four, dtype=torch.float32)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return perturbed(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")))


def test_four_bit_layers(tmp_path: Any) -> None:
    model, batch = four_bit(tmp_path), batch_for("Llama")
    wanted = reference(model, "Llama", batch)
    attached(model)
    with torch.no_grad():
        model.eval()(**batch)
    model.train()(**batch).loss.backward()
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize("what", ["calibrate_cut", "cut_activations", "measure_density"])
def test_four_bit_layers_go_on_training_after_a_look_at_the_activations(what: str, tmp_path: Any) -> None:
    model, batch = four_bit(tmp_path), batch_for("Llama")
    model.train()(**batch).loss.backward()
    before = gradients(model)
    if what == "calibrate_cut":
        calibrate_cut(model, [batch], density=0.5)
    elif what == "measure_density":
        measure_density(model, [batch])
    else:
        with cut_activations(model, 0.1), torch.no_grad():
            model.eval()(**batch)
        model.train()
    model(**batch).loss.backward()
    assert_same(gradients(model), before)
