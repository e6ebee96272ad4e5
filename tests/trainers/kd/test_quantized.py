"""Teachers in four bits, and students that share a base in four bits with their teacher."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

from peft_dynamic import DyLoRAConfig, LorettaRepConfig
from peft_dynamic.hosts.quantization import unpack_bnb_4bit
from tests.trainers.kd.common import batch, classifier, rows, trainer

TARGETS: dict[str, Any] = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
FOUR = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.float32,
    llm_int8_skip_modules=["classifier", "pooler.dense"],  # which are trained
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: value for name, value in batch().items() if name != "labels"}).logits.float()


def linears(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def codes(model: Any) -> list[torch.Tensor]:
    """The packed numbers and the scales of all four-bit weights."""
    return [t for each in linears(model) for t in (each.weight.data.clone(), each.weight.quant_state.absmax.clone())]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    classifier(3, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_path_is_loaded_in_four_bits(base: Path, tmp_path: Path) -> None:
    """What it says is what the dequantised weights say, in bfloat16's rounding; and it is not the file's model."""
    made = trainer(tmp_path / "out", base, classifier(0), teacher_quantization="nf4", max_steps=4, kd_weight=1.0)
    teacher: Any = made.distiller.teacher
    model = teacher.at(0.0)
    assert linears(model)
    assert all(each.weight.quant_type == "nf4" for each in linears(model))
    plain = type(model).from_pretrained(base)
    whole = logits(plain)
    for name, module in plain.named_modules():
        four = model.get_submodule(name)
        if isinstance(four, bitsandbytes.nn.Linear4bit):
            weight = four.weight
            module.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    rounded = logits(plain)
    assert (rounded - whole).norm() > 0.02 * whole.norm()
    said = teacher.logits({name: value for name, value in batch().items() if name != "labels"}, 0.0).float()
    assert (said - rounded).norm() < 0.2 * (rounded - whole).norm()
    before = codes(model)
    made.train()
    assert all(torch.equal(a, b) for a, b in zip(before, codes(model), strict=True))


@pytest.mark.parametrize("kind", ["base", "adapter:big", "full_rank", "ema", "folder"])
def test_a_shared_base_in_four_bits_trains_after_an_evaluation(kind: str, base: Path, tmp_path: Path) -> None:
    def four() -> Any:
        model = type(classifier(0)).from_pretrained(base, quantization_config=FOUR)
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    torch.manual_seed(1)
    config: Any = LoraConfig(r=2, init_lora_weights=False, **TARGETS)
    teacher = kind
    if kind == "full_rank":
        config = DyLoRAConfig(r=4, ranks=[1, 4], rank_sampling="uniform", init_lora_weights=False, **TARGETS)
    if kind == "folder":
        big = get_peft_model(four(), LoraConfig(r=4, init_lora_weights=False, **TARGETS))
        big.save_pretrained(tmp_path / "big")
        config = LorettaRepConfig(bottleneck=4, tensor_rank=2, train_layer_norms=False, **TARGETS)
        teacher = str(tmp_path / "big")
    model = get_peft_model(four(), config)
    if kind == "adapter:big":
        model.add_adapter("big", LoraConfig(r=4, init_lora_weights=False, **TARGETS))
    for each in linears(model):
        each.support_avx512bf16_for_cpu = True
    made = trainer(tmp_path / "out", teacher, model, max_steps=4, kd_weight=0.5, learning_rate=1e-2)
    # bitsandbytes' kernel without gradients, which CPUs with AVX512-BF16 have, is out of the way on every CPU
    assert not any(each.support_avx512bf16_for_cpu for each in linears(model))
    packed, start = codes(model), {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    made.eval_dataset = Dataset.from_list(rows(count=8))
    first = made.evaluate()
    made.train()
    second = made.evaluate()
    assert first["eval_loss"] != second["eval_loss"]
    moved = [name for name, p in model.named_parameters() if name in start and not torch.equal(p, start[name])]
    assert len(moved) == len(start)
    assert packed
    assert all(torch.equal(a, b) for a, b in zip(packed, codes(model), strict=True))
    if kind == "folder":
        shown: Any = made.distiller.teacher
        theirs = {each.weight.data_ptr() for each in linears(shown.at(0.0))}
        assert theirs == {each.weight.data_ptr() for each in linears(model)}
        alone = PeftModel.from_pretrained(four(), tmp_path / "big").eval()
        unpack_bnb_4bit(alone)  # on some CPUs bitsandbytes has a kernel of its own, in bfloat16
        torch.testing.assert_close(logits(shown.at(0.0)), logits(alone))


def test_a_head_in_four_bits_is_refused_by_name(base: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = type(classifier(0)).from_pretrained(base, quantization_config=config)
    with pytest.raises(ValueError, match=r"trains bert\.pooler\.dense, classifier whole.*llm_int8_skip_modules"):
        get_peft_model(model, LorettaRepConfig(bottleneck=4, tensor_rank=2, **TARGETS))
