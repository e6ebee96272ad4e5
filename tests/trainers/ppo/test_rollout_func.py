"""`rollout_func`: what it is given, what it may return, and that training on its completions is training on ours."""

import inspect
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from peft_dynamic.trainers.ppo.completions import Completions
from peft_dynamic.trainers.ppo.rollout_func import read
from tests.trainers.ppo.common import EOS, QUIET, config, early_letters, prompts, tiny_policy, tokenizer, trainer

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def lora() -> LoraConfig:
    return LoraConfig(**LORA)


def our_own(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """The trainer's own generation, through the door."""
    made = trainer.generator(
        trainer.model, trainer.policy, trainer.generator.tokenize(prompts), trainer.do_sample, len(prompts)
    )
    ids = [row[:n].tolist() for row, n in zip(made.ids, made.prompt_lengths, strict=True)]
    return {"prompt_ids": ids, "completion_ids": made.completion_ids(), "logprobs": None}


def fixed(completions: list[list[int]], logprobs: Any = None, **fields: Any) -> Any:
    def function(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return {"prompt_ids": [[0]] * len(prompts), "completion_ids": completions, "logprobs": logprobs, **fields}

    return function


def trained(made: Any) -> dict[str, torch.Tensor]:
    made.train()
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


def test_training_on_the_completions_of_a_function_is_training_on_our_own(tmp_path: Path) -> None:
    own = trained(trainer(tmp_path / "own", peft_config=lora()))
    other = trained(trainer(tmp_path / "other", peft_config=lora(), rollout_func=our_own))
    start = trained(trainer(tmp_path / "start", peft_config=lora(), learning_rate=0.0))
    for name, tensor in own.items():
        assert torch.equal(tensor, other[name]), name
    assert any(not torch.equal(tensor, start[name]) for name, tensor in own.items())


def test_resuming_inside_a_rollout_does_not_ask_the_function_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def counted(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        asked.append(trainer.state.global_step)
        return our_own(prompts, trainer)

    settings = {"peft_config": lora(), "rollout_func": counted, "save_strategy": "steps", "save_steps": 1}
    settings |= {"num_ppo_epochs": 3, "max_steps": 6}
    whole = trained(trainer(tmp_path, **settings))
    assert asked == [0, 3]
    resumed = trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert asked == [0, 3, 3]
    for name, p in resumed.model.named_parameters():
        assert name not in whole or torch.equal(p, whole[name]), name


def test_what_the_function_is_given(tmp_path: Path) -> None:
    seen: list[Any] = []

    def function(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        modes = (trainer.do_sample, trainer.model.training, torch.is_grad_enabled())
        seen.append((deepcopy(prompts[0]), modes, trainer.num_generations))
        prompts[0][0]["content"] = "changed"  # the dataset's row is not
        return fixed([[1, EOS]] * len(prompts))(prompts, trainer)

    rows = prompts(4).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    asked: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        asked.append((prompts[0], completions[0]))
        return [0.0] * len(prompts)

    made = trainer(
        tmp_path,
        reward_funcs=reward,
        rollout_func=function,
        train_dataset=rows,
        eval_dataset=rows,
        shuffle_dataset=False,
        max_steps=1,
    )
    made.train()
    made.evaluate()
    first = [{"role": "user", "content": "a"}]
    assert seen == [(first, (True, False, False), 1), (first, (False, False, False), 1)]
    assert asked == [(first, [{"role": "assistant", "content": "b"}])] * 2


def test_the_end_is_where_our_own_generation_would_have_ended(tmp_path: Path) -> None:
    completions = [[0, EOS, 3, 3], [1, 2, 3, 2, 0], [4, 5], [EOS]]
    made = trainer(tmp_path, rollout_func=fixed(completions), stop_strings=["cd"])
    done = made.rollouts.complete(["a"] * 4, True, (0, 0, 0))
    assert done.completion_ids() == [[0, EOS], [1, 2, 3], [4, 5], [EOS]]
    assert done.ended.tolist() == [True, True, False, True]
    assert done.prompt_lengths.tolist() == [1] * 4
    # and as Ends says of tokens that we generate ourselves
    own = trainer(tmp_path, tiny_policy(seed=3), stop_strings=["cd", "ka"], max_completion_length=20)
    drawn = own.rollouts.complete(["a", "b"] * 20, True, (1, 2, 3))
    ends = [own.generator.end_of(ids) for ids in drawn.completion_ids()]
    assert ends == list(zip(drawn.lengths.tolist(), drawn.ended.tolist(), strict=True))
    assert 0 < sum(drawn.ended.tolist()) < 40


def test_log_probabilities_are_compared_with_the_policys_and_not_trained_on(tmp_path: Path) -> None:
    completions = [[1, 2], [3, EOS, 5], [4], [EOS]]
    plain = trainer(tmp_path, rollout_func=fixed(completions), max_steps=1)
    exact = plain.rollouts.score(plain.rollouts.complete(["a"] * 4, True, (0, 0, 0)))[0]
    given: list[Any] = [
        [float(exact[0, 0]) - 0.5, None],
        [*exact[1, :2].tolist(), -9.0],
        [math.nan],
        torch.tensor([0.0]),
    ]
    other = trainer(tmp_path, rollout_func=fixed(completions, given), max_steps=1)
    rollouts = [made.rollouts.make([{"prompt": "a"}] * 4, 0) for made in (plain, other)]
    for key, tensor in rollouts[0].items():
        assert torch.equal(tensor, rollouts[1][key]), key
    logged = [made.metrics.take("train") for made in (plain, other)]
    name = "sampling/sampling_logp_difference"
    last = abs(float(exact[3, 0]))
    assert logged[1].pop(f"{name}/mean") == pytest.approx((0.5 + last) / 4, rel=1e-5)  # of 4 tokens that have one
    assert logged[1].pop(f"{name}/max") == pytest.approx(max(0.5, last), rel=1e-5)
    assert logged[0] == logged[1]


def test_further_fields_reach_the_reward_functions(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def reward(completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0] * len(completions)

    fields = {"steps": [1, 2, 3, 4], "engine": "x", "wanted": list("wxyz")}
    made = trainer(tmp_path, reward_funcs=reward, rollout_func=fixed([[1]] * 4, **fields))
    made.rollouts.make([{"prompt": "a", "wanted": "b"}] * 4, 0)
    assert seen["steps"] == [1, 2, 3, 4]
    assert seen["engine"] == ["x"] * 4
    assert seen["wanted"] == list("wxyz")  # in place of the dataset's, as in GRPOTrainer


GOOD: dict[str, Any] = {"prompt_ids": [[0], [1, 2]], "completion_ids": [[3, 4], [5]], "logprobs": [[-1, -2.0], [-1.0]]}
BAD: list[tuple[Any, type[Exception], str]] = [
    (None, TypeError, "returned a NoneType; it must return a dict with prompt_ids, completion_ids, logprobs"),
    ({"logprobs": ...}, ValueError, r"without 'logprobs'.*may be None"),
    ({"completion_ids": 3}, TypeError, "completion_ids as a int; it must be a list"),
    ({"completion_ids": [[3]]}, ValueError, "1 completion_ids for 2 prompts.*num_generations is 1"),
    ({"prompt_ids": [[0]] * 4}, ValueError, "4 prompt_ids for 2 prompts"),
    ({"completion_ids": [[3], "ab"]}, TypeError, r"completion_ids\[1\]='ab'; it must be a list of token ids"),
    ({"completion_ids": [[3], []]}, ValueError, r"empty completion_ids\[1\].*the EOS token alone"),
    ({"prompt_ids": [[], [1]]}, ValueError, r"empty prompt_ids\[0\]"),
    ({"completion_ids": [[3, 1.0], [5]]}, TypeError, r"completion_ids\[0\]\[1\]=1.0; a token id is an int"),
    ({"completion_ids": [[3, True], [5]]}, TypeError, r"completion_ids\[0\]\[1\]=True; a token id is an int"),
    (
        {"completion_ids": [[3, 17], [5]]},
        ValueError,
        r"completion_ids\[0\]\[1\]=17, and the policy has",
    ),
    ({"prompt_ids": [[-100], [1]]}, ValueError, r"prompt_ids\[0\]\[0\]=-100, .*0 to 16.*Drop what pads"),
    (
        {"completion_ids": [[3] * 6, [5]]},
        ValueError,
        r"6 tokens in completion_ids\[0\], more than max_.*=5",
    ),
    ({"prompt_ids": [[0] * 63, [1]]}, ValueError, r"63 tokens in prompt_ids\[0\] and 2 in .* 64 positions"),
    ({"logprobs": [[-1.0], [-1.0]]}, ValueError, r"1 numbers in logprobs\[0\] for the 2 tokens"),
    ({"logprobs": [[-1.0, -1.0]]}, ValueError, "1 logprobs for 2 prompts"),
    ({"logprobs": [-1.0, -2.0]}, ValueError, r"-1.0 in logprobs\[0\] for the 2 tokens"),
    ({"logprobs": [[-1.0, 0.7], [-1.0]]}, ValueError, r"logprobs\[0\]\[1\]=0.7.*natural logarithm"),
    ({"logprobs": [[-1.0, -math.inf], [-1.0]]}, ValueError, r"logprobs\[0\]\[1\]=-inf"),
    ({"logprobs": [[-1.0, [-1.0]], [-1.0]]}, ValueError, r"logprobs\[0\]\[1\]=\[-1.0\]"),
    ({"env_mask": [[1, 1], [1]]}, ValueError, "'env_mask', which marks tokens that the policy did not choose"),
    ({"trainer_state": [1, 2]}, ValueError, "'trainer_state', which PPOTrainer passes"),
    ({"steps": [1, 2, 3]}, ValueError, "3 values of 'steps' for 2 prompts"),
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = trainer(tmp_path_factory.mktemp("judge"))
    return lambda output: read(output, 2, made.generator, 17, "cpu")


@pytest.mark.parametrize(("change", "kind", "text"), BAD, ids=[text[:40] for _, _, text in BAD])
def test_what_cannot_be_trained_on_is_refused(judge: Any, change: Any, kind: type[Exception], text: str) -> None:
    assert isinstance(judge(GOOD), Completions)
    output = change if change is None else {k: v for k, v in (GOOD | change).items() if v is not ...}
    with pytest.raises(kind, match=text):
        judge(output)


def test_tensors_and_arrays_are_lists_too(judge: Any) -> None:
    done = judge(
        {
            "prompt_ids": torch.tensor([[0, 1], [1, 2]]),
            "completion_ids": [torch.tensor([3, 4]), torch.tensor([5]).numpy()],
            "logprobs": [torch.tensor([-1.0, -2.0]), [torch.tensor(-1.0).numpy()[()]]],
        }
    )
    assert done.ids.tolist() == [[0, 1, 3, 4], [1, 2, 5, EOS]]
    assert done.sampled.tolist()[0] == [-1.0, -2.0]


def test_nothing_is_updated_by_what_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, rollout_func=fixed([[1], [2], [3], [99]]))
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    with pytest.raises(ValueError, match=r"completion_ids\[3\]\[0\]=99"):
        made.train()
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert made.state.global_step == 0


def test_an_error_of_the_function_says_whose_it_is(tmp_path: Path) -> None:
    def broken(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        raise ConnectionError("no server")

    made = trainer(tmp_path, rollout_func=broken)
    with pytest.raises(ConnectionError, match="no server") as caught:
        made.train()
    assert "Raised by rollout_func" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match="rollout_func='vllm' must be a function"):
        trainer(tmp_path, rollout_func="vllm")


def test_the_same_function_serves_grpo_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary: what TRL's GRPOTrainer passes to `rollout_func`, and what it wants back."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl import GRPOConfig, GRPOTrainer

    from peft_dynamic.trainers import PPOTrainer

    assert "rollout_func" in inspect.signature(GRPOTrainer).parameters
    calls: list[tuple[list[Any], str]] = []

    def function(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        calls.append((prompts, type(trainer).__name__))
        ids = trainer.processing_class(prompts)["input_ids"]
        completions = [[1 + row % 3, EOS] for row in range(len(prompts))]
        return {
            "prompt_ids": ids,
            "completion_ids": completions,
            "logprobs": [[-1.0] * len(each) for each in completions],
            "number": list(range(len(prompts))),
            "trained_by": "all",
        }

    passed: list[tuple[list[int], list[str]]] = []

    def reward(completion_ids: list[list[int]], number: list[int], trained_by: list[str], **_: Any) -> list[float]:
        passed.append((number, trained_by))
        return early_letters(completion_ids)

    common = {"train_dataset": prompts(4), "processing_class": tokenizer(), "rollout_func": function}
    sizes = {"per_device_train_batch_size": 4, "max_completion_length": 5, "max_steps": 1, "shuffle_dataset": False}
    settings = GRPOConfig(str(tmp_path / "grpo"), num_generations=2, bf16=False, **sizes, **QUIET)
    GRPOTrainer(tiny_policy(), reward, settings, **common).train()
    PPOTrainer(tiny_policy(), reward, config(tmp_path / "ppo", **sizes), **common).train()
    # One prompt for each completion that is wanted: GRPOTrainer repeats it num_generations times itself
    assert calls == [(["a", "a", "bb", "bb"], "GRPOTrainer"), (["a", "bb", "ccc", "dddd"], "PPOTrainer")]
    assert passed == [([0, 1, 2, 3], ["all"] * 4)] * 2

    def incomplete(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return {key: value for key, value in function(prompts, trainer).items() if key != "logprobs"}

    with pytest.raises(ValueError, match="logprobs"):
        GRPOTrainer(tiny_policy(), reward, settings, **(common | {"rollout_func": incomplete})).train()
