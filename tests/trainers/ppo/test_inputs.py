"""What is refused, when, and what it says; and the kinds of reward functions that are taken."""

import asyncio
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from peft_dynamic.trainers import PPOTrainer
from peft_dynamic.trainers.ppo.rewards import Rewards
from tests.trainers.ppo.common import EOS, config, early_letters, prompts, tiny_policy, tokenizer, trainer

CPU = torch.device("cpu")
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


# ---- Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_completion_length": 0}, "max_completion_length=0 must be above 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs=0 must be above 0"),
        ({"num_mini_batches": -1}, "num_mini_batches=-1 must be above 0"),
        ({"cliprange": 0.0}, "cliprange=0.0 must be above 0"),
        ({"kl_coef": -0.1}, "kl_coef=-0.1 must be 0 or above"),
        ({"vf_coef": math.nan}, "vf_coef=nan must be 0 or above"),
        ({"gamma": 1.5}, r"gamma=1.5 must lie in 0\.\.1"),
        ({"lam": -0.5}, r"lam=-0.5 must lie in 0\.\.1"),
        ({"kl_target": 0.0}, "kl_target=0.0 must be above 0, or None"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target=6.0 adapts kl_coef, which never leaves 0"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1.0 must be above 0"),
        ({"kl_estimator": "k2"}, "kl_estimator='k2' must be one of"),
        ({"stop_token": "</s>"}, "stop_token='</s>' must be 'eos' or None"),
        ({"stop_strings": "end"}, "stop_strings='end' must be a list"),
        ({"stop_strings": [""]}, "must be a list of non-empty strings"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True would change the size of a rollout"),
    ],
)
def test_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


# ---- Arguments


def encoder_decoder() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=17, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4))


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no prompt": (lambda: {"train_dataset": Dataset.from_list([{"text": "a"}])}, r"columns \['text'\] and no `prompt`"),
    "tokens": (lambda: {"train_dataset": Dataset.from_list([{"prompt": 3}])}, "must be text or a list of messages"),
    "no rows": (lambda: {"train_dataset": Dataset.from_dict({"prompt": []})}, "has no rows"),
    "stream": (lambda: {"train_dataset": prompts().to_iterable_dataset()}, "has no length .* could not be resumed"),
    "eval": (lambda: {"eval_dataset": {"x": Dataset.from_list([{"text": "a"}])}}, "no `prompt`"),
    "no eos": (
        lambda: {"processing_class": tokenizer(eos_token=None)},
        r"no EOS token.*stop_token_id=.*stop_token=None",
    ),
    "no functions": (lambda: {"reward_funcs": []}, "reward_funcs is empty"),
    "weights": (lambda: {"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1 reward_funcs"),
    "two adapters": (
        lambda: {"model": get_peft_model(tiny_policy(), LoraConfig(**LORA)), "peft_config": LoraConfig(**LORA)},
        "has an adapter already",
    ),
    "nothing trained": (lambda: {"model": tiny_policy().requires_grad_(False)}, "no parameter that is trained"),
    "encoder": (lambda: {"model": encoder_decoder()}, "encoder-decoder; PPOTrainer trains decoders"),
    "value model": (lambda: {"value_model": tiny_policy()}, "gives no value per token.*num_labels=1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **make())


def test_kinds_of_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args is a TrainingArguments; pass a PPOConfig"):
        PPOTrainer(tiny_policy(), early_letters, TrainingArguments(str(tmp_path)))
    with pytest.raises(TypeError, match="holds 3, which is neither"):
        trainer(tmp_path, reward_funcs=[3])
    with pytest.raises(ValueError, match="train_dataset is None"):
        trainer(tmp_path, train_dataset=None).train()


def test_without_eos_a_stop_token_or_a_fixed_length_will_do(tmp_path: Path) -> None:
    for settings in ({"stop_token_id": 3}, {"stop_token": None}):
        made = trainer(tmp_path, processing_class=tokenizer(eos_token=None, pad_token=None), max_steps=1, **settings)
        made.train()
        assert made.state.global_step == 1


# ---- Errors on the way: the checkpoint before them is whole


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "raises": (KeyError("label"), KeyError, "label"),
    "too few": ([1.0], ValueError, "'paid' returned 1 rewards for 4 completions"),
    "nan": ([1.0, math.nan, 1.0, 1.0], ValueError, "'paid' returned nan for the completion"),
    "infinite": ([1.0, math.inf, 1.0, 1.0], ValueError, "'paid' returned inf for the completion"),
    "none": ([1.0, None, 1.0, 1.0], ValueError, r"All reward functions \(paid\) returned None for the completion"),
    "a number": (3.0, TypeError, "'paid' returned 3.0; it must return a list"),
    "long prompt": ("long", ValueError, r"60 tokens and max_completion_length=5 .* 64 positions"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reward_or_prompt_stops_at_its_step_and_the_checkpoint_resumes(tmp_path: Path, name: str) -> None:
    answer, kind, message = BAD[name]
    good = True

    def paid(completions: list[str], trainer_state: Any, **_: Any) -> Any:
        if good or trainer_state.global_step < 2 or answer == "long":
            return [0.5] * len(completions)
        if isinstance(answer, Exception):
            raise answer
        return answer

    rows = [{"prompt": "a"}] * 8
    if answer == "long":
        rows = [{"prompt": "a"}] * 4 + [{"prompt": "a" * 60}] * 4
    settings = {"save_strategy": "steps", "save_steps": 2, "num_ppo_epochs": 2, "shuffle_dataset": False}
    good = False
    with pytest.raises(kind, match=message) as raised:
        trainer(tmp_path, reward_funcs=paid, train_dataset=Dataset.from_list(rows), **settings).train()
    if name == "raises":
        assert "reward function 'paid'" in raised.value.__notes__[0]
    good = True
    again = trainer(tmp_path, reward_funcs=paid, train_dataset=Dataset.from_list([{"prompt": "a"}] * 8), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4


# ---- Reward functions


def call(rewards: Rewards, completions: list[Any], prompts: list[Any] | None = None, **columns: Any) -> torch.Tensor:
    prompts = ["a"] * len(completions) if prompts is None else prompts
    return rewards(prompts, completions, [[0]] * len(completions), columns, CPU)


def test_async_functions_run_at_the_same_time_and_in_a_running_loop() -> None:
    meeting: list[asyncio.Event] = []

    async def waits(completions: list[str], **_: Any) -> list[float]:
        meeting.append(asyncio.Event())
        await asyncio.wait_for(meeting[0].wait(), 20)
        return [1.0] * len(completions)

    async def opens(completions: list[str], **_: Any) -> list[float | None]:
        while not meeting:
            await asyncio.sleep(0.001)
        meeting[0].set()
        return [2.0, None]

    rewards = Rewards([waits, opens])

    async def in_a_loop() -> torch.Tensor:
        return call(rewards, ["x", "y"])

    found = asyncio.run(in_a_loop())
    assert found[:, 0].tolist() == [1.0, 1.0]
    assert found[0, 1] == 2.0
    assert found[1, 1].isnan()
    assert rewards.total(found).tolist() == [3.0, 1.0]

    async def fails(**_: Any) -> list[float]:
        raise RuntimeError("no answer")

    with pytest.raises(RuntimeError, match="no answer") as raised:
        call(Rewards([fails]), ["x"])
    assert "'fails'" in raised.value.__notes__[0]


def test_objects_partials_tensors_and_names() -> None:
    class Judge:
        def __call__(self, completions: list[str], **_: Any) -> torch.Tensor:
            return torch.tensor([len(text) for text in completions])

    def scaled(factor: float, completions: list[str], **_: Any) -> list[float]:
        return [factor] * len(completions)

    rewards = Rewards([Judge(), functools.partial(scaled, 2.0), functools.partial(scaled, 3.0)], [1.0, 0.5, -1.0])
    assert rewards.names == ["Judge", "scaled", "scaled_2"]
    found = call(rewards, ["x", "yy"])
    assert found.tolist() == [[1.0, 2.0, 3.0], [2.0, 2.0, 3.0]]
    assert rewards.total(found).tolist() == [-1.0, 0.0]


def reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=17, num_labels=1, **shape))


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_judges_the_whole_text_by_its_last_token(tmp_path: Path, chat: bool) -> None:
    model = reward_model()
    texts, answers = ["ab", "c"], ["cd", "defg"]
    wanted = []
    for text, answer in zip(texts, answers, strict=True):
        whole = f"{text}{answer}"
        if chat:  # roles' first letters are in the template: u is no letter of the tokenizer, a is
            whole = tokenizer().apply_chat_template(
                [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], tokenize=False
            )
        ids = torch.tensor([tokenizer()(whole)["input_ids"]])
        wanted.append(model.score(model.model(ids)[0])[0, -1, 0].item())
    prompts: list[Any] = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    completions: list[Any] = [[{"role": "assistant", "content": answer}] for answer in answers] if chat else answers
    found = call(Rewards(model, tokenizers=tokenizer(pad_token="p")), completions, prompts)
    assert found[:, 0].tolist() == pytest.approx(wanted, rel=1e-4)
    model.save_pretrained(tmp_path / "judge")
    tokenizer().save_pretrained(tmp_path / "judge")
    by_path = Rewards(str(tmp_path / "judge"))
    assert by_path.names == ["judge"]
    if not chat:
        assert call(by_path, completions, prompts)[:, 0].tolist() == pytest.approx(wanted, rel=1e-4)


def test_a_model_with_several_labels_is_no_judge() -> None:
    model = reward_model()
    model.config.num_labels = 2
    with pytest.raises(ValueError, match="has 2 labels; it must have 1"):
        Rewards(model, tokenizers=tokenizer())


def test_conversations_reach_the_functions_as_messages(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in "abcd"])
    trainer(tmp_path, reward_funcs=reward, train_dataset=rows, max_steps=1).train()
    prompt, completion = seen[0]
    assert (prompt[0]["role"], prompt[0]["content"] in "abcd") == ("user", True)
    assert completion[0]["role"] == "assistant"
    assert set(completion[0]["content"]) <= set("abcdefghijklmnop")
    assert EOS not in completion[0]["content"].encode()
