"""`nlu_reward` as a reward function of TRL's trainers and of ours, unchanged, on text and on conversations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dynamic.trainers import PPOConfig, PPOTrainer, nlu_prompt, nlu_reward
from tests.trainers.ppo.common import QUIET
from tests.trainers.ppo.nlu_words import tokenizer

COMPLETIONS = 64  # of 4 of 6 words each, so that every reward is among them
COMMON = {
    "per_device_train_batch_size": COMPLETIONS,
    "max_completion_length": 4,
    "max_steps": 1,
    **QUIET,
}


def make(trainer: str, folder: Path, data: Dataset, rewards: list[Any]) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=6, eos_token_id=0, pad_token_id=0, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")  # RLOOTrainer loads its reference from there
    model = LlamaForCausalLM.from_pretrained(folder / "tiny")
    if trainer == "PPO":
        return PPOTrainer(model, rewards, PPOConfig(str(folder), **COMMON), data, processing_class=tokenizer())
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    made, settings = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}[trainer]
    arguments = settings(str(folder), num_generations=4, bf16=False, **COMMON)
    return made(model, rewards, arguments, data, processing_class=tokenizer())


def plainly(text: str, label: int) -> float:
    """The reward of an answer of whole words, without the parser."""
    words = text.split()
    if "</Judgement>" not in words:
        return -3.0
    said = words[: words.index("</Judgement>")]
    if "<Judgement>" in said:
        said = said[len(said) - said[::-1].index("<Judgement>") :]
    said = [word for word in said if word in ("Yes", "No")]
    return -3.0 if len({*said}) != 1 else 1.0 if said[0] == ("No", "Yes")[label] else -1.0


@pytest.mark.parametrize("trainer", ["PPO", "GRPO", "RLOO"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_training_step(trainer: str, chat: bool, tmp_path: Path) -> None:
    rows = [{"sentence": f"{'a ' * (i % 3)}No", "label": i % 2, "idx": i} for i in range(COMPLETIONS)]
    data = Dataset.from_list([row | {"prompt": nlu_prompt("cola", row, chat=chat)} for row in rows])
    seen: list[tuple[str, int]] = []

    def witness(completions: list[Any], label: list[int], idx: list[int], **columns: Any) -> list[float]:
        assert [i % 2 for i in idx] == label
        texts = [each[0]["content"] for each in completions] if chat else completions
        seen.extend(zip(texts, label, strict=True))
        return [0.0] * len(completions)

    made = make(trainer, tmp_path, data, [nlu_reward("cola"), witness])
    weight = made.model.lm_head.weight
    before = weight.detach().clone()
    made.train()
    expected = [plainly(text, label) for text, label in seen]
    assert len(expected) == COMPLETIONS
    assert {-3.0, -1.0, 1.0} == {*expected}  # or this would show little
    log = next(log for log in made.state.log_history if "rewards/nlu_reward_cola/mean" in log)
    assert log["rewards/nlu_reward_cola/mean"] == pytest.approx(sum(expected) / COMPLETIONS)
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("trainer", ["PPO", "GRPO", "RLOO"])
def test_rows_without_a_label_stop_the_training(trainer: str, tmp_path: Path) -> None:
    data = Dataset.from_list([{"prompt": "a", "label": -1}] * 16)
    with pytest.raises(ValueError, match="label=-1: for the task 'cola'"):
        make(trainer, tmp_path, data, [nlu_reward("cola")]).train()
