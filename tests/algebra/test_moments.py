"""Second moments of what an adapter's factors see, and the cuts that they calibrate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_dynamic import AdapterMoments, adapter_moments, resize_adapter
from peft_dynamic.algebra.checkpoint import read_checkpoint
from tests.conformance.cases import perturb
from tests.tuners.common import rows, tiny_llama

TARGETS = ["q_proj", "down_proj"]


def adapted(**settings: Any) -> Any:
    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings))
    model = get_peft_model(tiny_llama(), config)
    perturb(model)
    return model.eval()


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 60, (2, 7))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


def test_the_moments_are_those_of_the_tokens_that_are_no_padding() -> None:
    model = adapted()
    seen: dict[str, list[torch.Tensor]] = {}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    handles = [
        module.lora_A["default"].register_forward_hook(
            lambda _, args, output, name=name: output.retain_grad() or seen.setdefault(name, []).append(output)
        )
        for name, module in layers.items()
    ]
    data = batches()
    for batch in data:
        model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    found = adapter_moments(model, data)
    assert found.tokens == sum(int(batch["attention_mask"].sum()) for batch in data)
    assert found.inputs.keys() == found.losses.keys() == layers.keys()
    for name, outputs in seen.items():
        keep = [batch["attention_mask"].flatten() != 0 for batch in data]
        z = torch.cat([o.detach().flatten(0, 1)[k] for o, k in zip(outputs, keep, strict=True)]).double()
        d = torch.cat([o.grad.flatten(0, 1)[k] for o, k in zip(outputs, keep, strict=True)]).double()  # type: ignore[union-attr]
        torch.testing.assert_close(found.inputs[name], z.mT @ z / found.tokens)
        scale = layers[name].scaling["default"]
        torch.testing.assert_close(found.losses[name], d.mT @ d / scale**2 / found.tokens, atol=1e-12, rtol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_of_the_model_changes_and_a_frozen_one_works(tmp_path: Path) -> None:
    model = adapted(lora_dropout=0.5).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    first = adapter_moments(model, batches())
    assert model.training
    model.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    second = adapter_moments(frozen, batches())
    for name, value in first.losses.items():  # dropout and checkpointing were off
        torch.testing.assert_close(second.losses[name], value)
        torch.testing.assert_close(second.inputs[name], first.inputs[name])
    assert adapter_moments(frozen, batches(), loss=False).losses == {}


def test_saved_and_loaded_they_calibrate_the_same_cut(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "whole")
    moments = adapter_moments(model, batches())
    again = AdapterMoments.load(moments.save(tmp_path / "of" / "moments.safetensors"))
    assert again.tokens == moments.tokens
    for out, given in (("one", moments), ("other", again)):
        resize_adapter(tmp_path / "whole", tmp_path / out, rank=2, moments=given)
    one, other = (read_checkpoint(tmp_path / out).products for out in ("one", "other"))
    assert all(torch.equal(product.a, other[name].a) for name, product in one.items())
    resize_adapter(model, "small", parameters=0.5, moments=moments)
    assert "small" in model.peft_config


def changed(model: Any, folder: Path, data: list[dict[str, torch.Tensor]]) -> float:
    """The squared change of the outputs of the layers' updates on the data, over all tokens and modules."""
    other = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    whole = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    small = {name: m for name, m in other.named_modules() if hasattr(m, "lora_A")}
    inputs: dict[str, list[torch.Tensor]] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, m in whole.items()
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    total = 0.0
    for name, layer in whole.items():
        delta = layer.get_delta_weight("default") - small[name].get_delta_weight("default")
        for x, batch in zip(inputs[name], data, strict=True):
            kept = x.flatten(0, 1)[batch["attention_mask"].flatten() != 0]
            total += float((kept @ delta.mT).detach().square().sum())
    return total


def test_a_cut_by_inputs_changes_the_layers_outputs_least(tmp_path: Path) -> None:
    model, data = adapted(), batches()
    model.save_pretrained(tmp_path / "whole")
    moments = adapter_moments(model, data)
    errors = {}
    for how in ("plain", "inputs", "loss"):
        resize_adapter(tmp_path / "whole", tmp_path / how, rank=1, moments=moments, cut=how, damping=0.0)
        errors[how] = changed(model, tmp_path / how, data)
    assert errors["inputs"] < errors["plain"]
    assert errors["inputs"] < errors["loss"]


def test_bad_moments_and_batches_are_named(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "whole")
    moments = adapter_moments(model, batches(1))
    name = next(iter(moments.inputs))

    def refused(message: str, **settings: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            resize_adapter(tmp_path / "whole", tmp_path / "out", **({"rank": 2} | settings))
        assert not (tmp_path / "out").exists()

    refused("cut='best': must be", cut="best")
    refused("cut='loss' needs moments with loss=True", cut="loss", moments=AdapterMoments(moments.inputs, {}, 1))
    refused("cut='inputs' needs moments", cut="inputs")
    refused("damping=-1: must be", moments=moments, damping=-1)
    refused("are of another adapter", moments=AdapterMoments({}, {}, 1))
    refused("are of another adapter", moments=adapter_moments(adapted(r=2), batches(1)))
    broken = {**moments.inputs, name: moments.inputs[name] * float("nan")}
    refused("are not finite", moments=AdapterMoments(broken, moments.losses, 1))
    with pytest.raises(ValueError, match="batches is empty"):
        adapter_moments(model, [])
    with pytest.raises(ValueError, match="a batch gives no loss"):
        adapter_moments(model, [{"input_ids": rows(2)}])
    with pytest.raises(ValueError, match="the model has no LoRA layer"):
        adapter_moments(tiny_llama(), batches(1))
    with pytest.raises(ValueError, match="is an embedding"):
        adapter_moments(adapted(target_modules=["embed_tokens"]), batches(1))
    (tmp_path / "whole" / "x").mkdir()
    with pytest.raises(ValueError, match="holds no moments"):
        AdapterMoments.load(tmp_path / "whole" / "adapter_model.safetensors")
