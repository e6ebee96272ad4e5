"""QDyLoRA: real bitsandbytes layers on the CPU, 4 and 8 bit, and the trap that evaluation sets for training there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from peft_dynamic import DyLoRAConfig, QDyLoRAConfig
from peft_dynamic.hosts.quantization import is_quantized, quantized_layers
from tests.conformance.cases import perturb
from tests.tuners.common import RankRecorder, rows, schedule_of, train, trainable_state

bitsandbytes = pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import has_avx512bf16

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to .-bit linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*kernels.*:UserWarning"),
]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, each layer wide enough for bitsandbytes' blocks of 64."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantized(folder: Path, bits: int) -> Any:
    config = QDyLoRAConfig.quantization_config(bits, **({"compute_dtype": torch.float32} if bits == 4 else {}))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def adapted(folder: Path, bits: int, config: Any = QDyLoRAConfig, **settings: Any) -> Any:
    model = prepare_model_for_kbit_training(quantized(folder, bits), use_gradient_checkpointing=False)
    set_seed(1)
    defaults = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if config is not LoraConfig:
        defaults["rank_sampling"] = "uniform"
    return get_peft_model(model, config(**(defaults | settings)))


def gradients(model: Any) -> int:
    """How many factors get a gradient that is not zero, at full rank."""
    model.zero_grad()
    model.train()
    model(input_ids=rows(2), labels=rows(2)).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained)


@pytest.mark.parametrize("bits", [4, 8])
def test_training_moves_the_adapter_at_each_rank(base_folder: Path, bits: int) -> None:
    model = adapted(base_folder, bits)
    assert type(next(m for m in model.modules() if hasattr(m, "lora_views"))).__name__ == f"Linear{bits}bit" + (
        "Lt" if bits == 8 else ""
    )
    base = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    before = trainable_state(model)
    recorder = RankRecorder(model)
    optimizer, losses = None, []
    for _ in range(16):  # the same four rows each time, an evaluation after every step
        optimizer = train(model, 1, optimizer)
        losses.append(float(model.eval()(input_ids=rows()[:4], labels=rows()[:4]).loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert set(recorder.training) == {1, 2, 4, 8}
    assert all(not torch.equal(value, before[name]) for name, value in trainable_state(model).items())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in base.items())


@pytest.mark.parametrize("bits", [4, 8])
def test_ranks_merge_save_and_load(base_folder: Path, tmp_path: Path, bits: int) -> None:
    model = adapted(base_folder, bits)
    perturb(model)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(base_folder, bits), tmp_path)
    outputs = []
    with torch.no_grad():
        for rank in (1, 4, 8):
            model.set_rank(rank)
            loaded.set_rank(rank)
            outputs.append(model(input_ids=rows(2)).logits)
            assert torch.allclose(loaded(input_ids=rows(2)).logits, outputs[-1], atol=1e-4)
        assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)
        # merging rounds to 4 or 8 bits: no worse for ours at rank 8 than for a stock LoRA with the same factors
        stock = adapted(base_folder, bits, LoraConfig, lora_alpha=16)
        stock.load_state_dict(
            {k: v for k, v in model.state_dict().items() if "lora_schedule" not in k and "lora_" in k}, strict=False
        )
        errors = []
        for each in (model, stock.eval()):
            if bits == 4:  # the trap under test below also spoils a stock LoRA's merged weights
                for layer in (m for m in each.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)):
                    layer.support_avx512bf16_for_cpu = False
            exact = each(input_ids=rows(2)).logits
            each.merge_adapter()
            errors.append((each(input_ids=rows(2)).logits - exact).abs().max())
            each.unmerge_adapter()
        assert errors[0] <= 1.01 * errors[1] + 1e-4


def pack(model: Any) -> None:
    """What bitsandbytes does in the first eval-mode forward pass on a CPU with AVX512-BF16, on any CPU."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(
                module.weight.data, module.weight.quant_state
            )


@pytest.mark.skipif(not has_avx512bf16(), reason="the kernel for packed weights needs a CPU with AVX512-BF16")
def test_the_trap_is_real(base_folder: Path) -> None:
    """Without the remedy, packed weights stop a stock LoRA's gradients: should this fail, the remedy can go."""
    model = adapted(base_folder, 4, LoraConfig)
    assert gradients(model) == 14
    pack(model)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        assert gradients(model) < 14  # what lies before a packed layer gets none


@pytest.mark.parametrize("config", [DyLoRAConfig, QDyLoRAConfig])
def test_training_goes_on_after_evaluation_and_generation(base_folder: Path, config: Any) -> None:
    model = adapted(base_folder, 4, config)
    expected = gradients(model)
    assert expected == 14  # a fresh B is zero, so only the Bs get a gradient
    model.eval()
    with torch.no_grad():
        model(input_ids=rows(2))
    assert gradients(model) == expected
    model.eval()
    model.generate(input_ids=rows(2), max_new_tokens=3, do_sample=False)
    assert gradients(model) == expected
    packed = [m for m in model.modules() if getattr(getattr(m, "weight", None), "quant_state", None) is not None]
    assert packed
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in packed)


def test_weights_that_were_packed_before_are_unpacked(base_folder: Path) -> None:
    """The user evaluated the base model first."""
    reference = adapted(base_folder, 4)
    base = prepare_model_for_kbit_training(quantized(base_folder, 4), use_gradient_checkpointing=False)
    pack(base)
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    config = QDyLoRAConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", rank_sampling="uniform")
    model = get_peft_model(base, config)
    assert gradients(model) == gradients(reference)
    expected = reference(input_ids=rows(2)).logits
    # packing rounds the scales of the blocks to bfloat16
    assert torch.allclose(model(input_ids=rows(2)).logits, expected, atol=0.02 * float(expected.detach().abs().max()))


def test_an_unquantised_base_is_refused_with_the_fix(base_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    with pytest.raises(ValueError, match=r"quantization_config=QDyLoRAConfig.quantization_config\(\)"):
        get_peft_model(base, QDyLoRAConfig(target_modules="all-linear"))
    assert type(base.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    get_peft_model(base, DyLoRAConfig(target_modules="all-linear"))


def test_the_quantisation_config() -> None:
    four, eight = QDyLoRAConfig.quantization_config(), QDyLoRAConfig.quantization_config(8)
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    assert QDyLoRAConfig.quantization_config(bnb_4bit_quant_type="fp4").bnb_4bit_quant_type == "fp4"
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        QDyLoRAConfig.quantization_config(3)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_are_recognised(base_folder: Path, bits: int) -> None:
    model = quantized(base_folder, bits)
    assert len(quantized_layers(model)) == 14
    assert not is_quantized(model.lm_head)


def test_resume_on_a_quantised_base_equals_the_uninterrupted_run(base_folder: Path, tmp_path: Path) -> None:
    whole = adapted(base_folder, 4)
    train(whole, steps=6)
    half = adapted(base_folder, 4)
    optimizer = train(half, steps=3)
    half.save_pretrained(tmp_path)
    base = prepare_model_for_kbit_training(quantized(base_folder, 4), use_gradient_checkpointing=False)
    resumed = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    new = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-2)
    new.load_state_dict(optimizer.state_dict())
    train(resumed, steps=3, optimizer=new, first=3)
    assert int(schedule_of(resumed).step) == 6
    expected = trainable_state(whole)
    assert all(torch.equal(value, expected[name]) for name, value in trainable_state(resumed).items())
