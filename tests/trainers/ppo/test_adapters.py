"""PPO with adapters of PEFT and ours, and on quantised models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_dynamic import DyLoRAConfig
from tests.trainers.ppo.adapters import ADAPTERS
from tests.trainers.ppo.common import tiny_policy, trainer, weights
from tests.tuners.common import RankRecorder

pytestmark = [
    # PEFT, at each token that an adapter with virtual tokens generates
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    # PEFT, on loading prefix tuning into a model whose adapter has another key for it
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_adapter_alone_is_trained_and_the_reference_stays(name: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_policy(), ADAPTERS[name]())
    made = trainer(tmp_path, model=model, max_steps=8, num_ppo_epochs=2, learning_rate=3e-2)
    base, adapter = frozen(model), {n: p for n, p in weights(model).items() if n not in frozen(model)}
    ids = torch.tensor([[0, 1, 2, 3]])
    with torch.no_grad(), model.eval().disable_adapter():
        before = model(input_ids=ids).logits
    made.train()
    with torch.no_grad():
        with model.eval().disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, before)
        assert not torch.allclose(model(input_ids=ids).logits[:, -4:], before, atol=1e-4)
    now = weights(model)
    assert all(torch.equal(now[n], p) for n, p in base.items())
    unmoved = [n for n, p in adapter.items() if torch.equal(now[n], p)]
    assert not unmoved
    logs = [entry for entry in made.state.log_history if "kl" in entry]
    assert abs(logs[-1]["kl"]) > 1e-5
    assert all(0 < entry["entropy"] < 4 for entry in logs)


def test_dylora_samples_and_is_compared_at_its_set_rank_and_trains_at_those_drawn(tmp_path: Path) -> None:
    settings = {"target_modules": "all-linear", "rank_sampling": "uniform", "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_policy(), DyLoRAConfig(r=8, ranks=[1, 2, 4, 8], **settings))
    recorder = RankRecorder(model)
    trainer(tmp_path, model=model, max_steps=12, num_ppo_epochs=4).train()
    assert set(recorder.evaluation) == {8}
    assert len(recorder.training) == 12
    assert len(set(recorder.training)) > 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, checkpointing: bool) -> None:
    found = []
    for switch in (False, checkpointing):
        made = trainer(
            tmp_path, peft_config=ADAPTERS["lora"](), gradient_checkpointing=switch, learning_rate=1e-3, max_steps=2
        )
        made.train()
        found.append(weights(made.model))
    for name, p in found[0].items():
        torch.testing.assert_close(p, found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_policy_keeps_learning_after_its_rollouts(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_policy().save_pretrained(tmp_path / "base")
    quantisation = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantisation)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = trainer(tmp_path, model=model, peft_config=lora, max_steps=6, num_ppo_epochs=2)
    norms = []
    for _ in range(2):
        before = {name: p for name, p in weights(made.model).items() if "lora_" in name}
        made.train()
        made.evaluate(made.train_dataset)
        norms += [entry["grad_norm"] for entry in made.state.log_history if "grad_norm" in entry]
        assert all(not torch.equal(p, before[n]) for n, p in made.model.named_parameters() if n in before)
    assert min(norms) > 0
