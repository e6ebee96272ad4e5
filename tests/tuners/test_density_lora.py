"""DensityLoRA: a LoRA whose adapter brings the density loss along, with the very gradients of the attached one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_dynamic.density import ActivationDensityLoss
from peft_dynamic.export import export_lora
from peft_dynamic.tuners.density_lora import DensityLoRAConfig, DensityLoRAModel
from tests.density.models import EPS, WEIGHT, assert_same, batch_for, build, gradients, perturbed, reference, task

FIELDS = {"density_weight": WEIGHT, "density_eps": EPS}


def adapted(family: str = "Llama", **settings: Any) -> Any:
    config = {"r": 4, "target_modules": "all-linear", "task_type": task(family)} | FIELDS | settings
    return perturbed(get_peft_model(build(family), DensityLoRAConfig(**config)))


def plain(family: str = "Llama") -> Any:
    return perturbed(
        get_peft_model(build(family), LoraConfig(r=4, target_modules="all-linear", task_type=task(family)))
    )


@pytest.mark.parametrize("family", ["Llama", "Bert", "T5"])
def test_both_ways_in_have_identical_gradients(family: str) -> None:
    batch = batch_for(family)
    model, other = adapted(family), plain(family)
    wanted = reference(other, family, batch)
    ActivationDensityLoss(WEIGHT, EPS).attach(other)
    losses = [each(**batch).loss for each in (model, other)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    found, attached = gradients(model), gradients(other)
    assert all(torch.equal(found[name], attached[name]) for name in attached)
    assert_same(found, wanted)


def test_every_field_reaches_the_loss() -> None:
    model = adapted(
        surrogate="tanh",
        activation_modules=["act_fn"],
        density_layer_weights={"layers.1": 0.5},
        include_padding=True,
    )
    assert isinstance(model.base_model, DensityLoRAModel)
    loss = model.base_model.density["default"]
    assert (loss.weight, loss.eps, loss.surrogate, loss.include_padding) == (WEIGHT, EPS, "tanh", True)
    assert (loss.activation_modules, loss.layer_weights) == (["act_fn"], {"layers.1": 0.5})
    assert len(loss.layers) == 2


def test_save_and_load_keep_the_loss_and_a_wrong_field_is_refused(tmp_path: Path) -> None:
    model, batch = adapted(activation_modules={"act_fn"}), batch_for("Llama")
    model(**batch).loss.backward()
    wanted = gradients(model)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, DensityLoRAConfig)
    assert (config.density_weight, config.density_eps, config.activation_modules) == (WEIGHT, EPS, ["act_fn"])
    loaded = PeftModel.from_pretrained(build("Llama"), tmp_path, is_trainable=True).train()
    loaded(**batch).loss.backward()
    assert_same(gradients(loaded), wanted)
    with pytest.raises(ValueError, match="DensityLoRAConfig: density_weight must be a number of at least 0, got -1"):
        DensityLoRAConfig(density_weight=-1)
    with pytest.raises(ValueError, match="DensityLoRAConfig: density_eps must be a positive number"):
        DensityLoRAConfig(density_eps=-1)


def test_it_is_a_plain_lora_otherwise(tmp_path: Path) -> None:
    model, other, batch = adapted(), plain(), batch_for("Llama")
    ids = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        model.eval()
        logits = model(**ids).logits
        assert torch.equal(logits, other.eval()(**ids).logits)
        model.save_pretrained(tmp_path / "adapter")
        export_lora(model, tmp_path / "lora")
        exported = PeftModel.from_pretrained(build("Llama"), tmp_path / "lora").eval()
        assert exported.peft_config["default"].peft_type == "LORA"
        assert torch.equal(exported(**ids).logits, logits)
    merged = model.merge_and_unload().train()
    torch.testing.assert_close(merged.eval()(**ids).logits, logits, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())


def test_the_active_adapter_decides() -> None:
    model, batch = adapted(), batch_for("Llama")
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "density_eps": EPS}
    model.add_adapter("off", DensityLoRAConfig(density_weight=0.0, **config))
    first, second = (model.base_model.density[name] for name in ("default", "off"))
    model(**batch)
    assert first.value is not None
    assert second.value is None
    first.value = None
    model.set_adapter("off")
    model(**batch)
    assert first.value is None
    assert second.value is not None
    second.value = None
    with model.disable_adapter():
        model(**batch)
    assert first.value is second.value is None
    model.set_adapter("default")
    model.delete_adapter("off")
    assert set(model.base_model.density) == {"default"}
    model(**batch).loss.backward()
    assert gradients(model)


def test_a_model_without_activations_is_left_as_it_was() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="activation_modules=None needs a model"):
        get_peft_model(base, DensityLoRAConfig(target_modules=["0"]))
    assert [type(module) for module in base] == [nn.Linear, nn.ReLU, nn.Linear]
    assert not any(module._forward_hooks for module in base.modules())
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(base, DensityLoRAConfig(target_modules=["nowhere"], activation_modules="1"))
    assert not any(module._forward_hooks for module in base.modules())
    model = get_peft_model(base, DensityLoRAConfig(target_modules=["0"], activation_modules="1", density_eps=1.0))
    loss = model(torch.randn(3, 4)).pow(2).mean() + model.base_model.density["default"].penalty()
    loss.backward()


def test_sft_trainer_makes_the_adapter_itself(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from tests.density.test_trainers import arguments, tokenizer_of_numbers

    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    deltas = {}
    for weight in (0.0, 1.0):
        trainer = trl.SFTTrainer(
            build("Llama"),
            args=arguments(tmp_path, trl.SFTConfig, seed=0, gradient_checkpointing=weight > 0, max_steps=2),
            train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
            processing_class=tokenizer_of_numbers(tmp_path),
            peft_config=DensityLoRAConfig(
                r=4, target_modules="all-linear", task_type="CAUSAL_LM", density_weight=weight, density_eps=EPS
            ),
        )
        trainer.train()
        logs = [entry["density_loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(logs) == 2
        assert all(0 < value < 1 for value in logs)
        deltas[weight] = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".lora_B." in n}
    assert all(not torch.equal(deltas[0.0][name], value) for name, value in deltas[1.0].items() if "layers.0" in name)
