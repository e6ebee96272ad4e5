"""Checkpoints, evaluation, logs, callbacks and what is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
    set_seed,
)

from peft_dynamic.trainers.ppo.sampler import RolloutSampler
from peft_dynamic.trainers.ppo.value_head import FILE
from tests.trainers.ppo.common import EOS, config, prompts, tiny_policy, tokenizer, trainer, weights

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


# ---- Order of the prompts


def test_all_prompts_of_an_epoch_come_though_nothing_divides() -> None:
    epoch = 0
    sampler = RolloutSampler(5, rollout=4, repeats=3, seed=0, epoch=lambda: epoch)
    found = [list(sampler)]
    epoch = 1
    found.append(list(sampler))
    for order in found:
        assert len(order) == len(sampler) == 24
        for run in (order[:12], order[12:]):
            assert run[:4] == run[4:8] == run[8:12]
        assert sorted(order[:4] + order[12:13]) == [0, 1, 2, 3, 4]  # then filled up from the epoch's beginning
        assert order[13:16] == order[:3]
    assert found[0] != found[1]
    assert list(sampler) == found[1]
    assert list(RolloutSampler(2, 4, 1, None, lambda: 0)) == [0, 1, 0, 1]  # fewer prompts than a rollout has


def test_each_row_reaches_the_reward_function_with_all_its_columns(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def reward(prompts: list[str], completions: list[str], wanted: list[str], **others: Any) -> list[float]:
        assert set(others) == {"completion_ids", "trainer_state", "log_extra", "log_metric"}
        seen.extend(zip(prompts, wanted, strict=True))
        return [0.0] * len(completions)

    made = trainer(tmp_path, reward_funcs=reward, num_train_epochs=1, max_steps=-1, train_dataset=prompts(6))
    made.train()
    assert made.state.global_step == 2 * 4  # two rollouts, four epochs each
    assert set(seen) == {(row["prompt"], row["wanted"]) for row in prompts(6)}
    assert len(seen) == 8


# ---- Resuming


@pytest.mark.parametrize(("adapted", "step"), [(True, 3), (False, 8), (True, 13)])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, adapted: bool, step: int) -> None:
    """From the middle of a rollout, from the end of an epoch, and from the second epoch."""
    settings: dict[str, Any] = {
        "max_steps": 15,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "kl_target": 0.01,
        "kl_horizon": 50,
        "save_strategy": "steps",
        "save_steps": step,
        "lr_scheduler_type": "cosine",
    }

    def made(**more: Any) -> Any:
        more = {"peft_config": LoraConfig(**LORA)} | more if adapted else more
        return trainer(tmp_path, train_dataset=prompts(15), **settings, **more)

    whole = made()
    whole.train()
    resumed = made(model=tiny_policy(seed=0))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.state.global_step == 15
    other = weights(resumed.model)
    for name, tensor in weights(whole.model).items():
        assert torch.equal(tensor, other[name]), name
    assert resumed.kl_coef == whole.kl_coef != 0.05
    logs = [[entry for entry in made.state.log_history if entry["step"] > step] for made in (whole, resumed)]
    for one, same in zip(*logs, strict=True):
        for key, value in one.items():
            if "runtime" not in key and "second" not in key and key != "train_loss":
                assert value == same[key], key


def test_resuming_with_other_sizes_or_without_the_rollout_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, peft_config=LoraConfig(**LORA), save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(ValueError, match=r"\[4, 4, 1\].*\[4, 2, 1\]"):
        trainer(tmp_path, peft_config=LoraConfig(**LORA), num_ppo_epochs=2).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2/ppo_state_0.pt").unlink()
    with pytest.raises(ValueError, match=r"no ppo_state_0\.pt: .*save_only_model"):
        trainer(tmp_path, peft_config=LoraConfig(**LORA)).train(resume_from_checkpoint=True)


def test_a_second_call_of_train_starts_a_new_rollout(tmp_path: Path) -> None:
    scored: list[list[list[int]]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        scored.append(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    made = trainer(tmp_path, max_steps=2, reward_funcs=reward)
    assert made.args.steps_per_rollout > 2  # so that something would be left of the first
    made.train()
    assert len(scored) == 1
    made.train()
    assert len(scored) == 2
    assert scored[0] != scored[1]


# ---- What is saved


def test_an_adapter_is_saved_clean_with_the_value_function_beside_it(tmp_path: Path) -> None:
    made = trainer(tmp_path, peft_config=LoraConfig(**LORA), save_strategy="steps", save_steps=4)
    made.train()
    made.save_model(str(tmp_path / "out"))
    for folder in (tmp_path / "out", tmp_path / "checkpoint-4"):
        assert all("lora_" in key for key in keys(folder / "adapter_model.safetensors"))
        assert keys(folder / FILE) == ["head.bias", "head.weight"]
        loaded = PeftModel.from_pretrained(tiny_policy(), folder)
        ids = torch.tensor([[0, 1, 2]])
        torch.testing.assert_close(loaded.eval()(ids).logits, made.model.eval()(ids).logits)
    again = trainer(tmp_path, peft_config=LoraConfig(**LORA))
    assert not again.value_function.head.weight.any()
    again.value_function.load(tmp_path / "out")
    assert torch.equal(again.value_function.head.weight, made.value_function.head.weight)
    assert made.value_function.head.weight.abs().max() > 1e-3
    made.model.save_pretrained(tmp_path / "policy")
    assert not (tmp_path / "policy" / FILE).exists()


def test_a_whole_model_is_saved_clean_and_goes_on_with_its_value_function(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path)
    made.train()
    made.save_model(str(tmp_path / "out"))
    assert not [key for key in keys(tmp_path / "out/model.safetensors") if "value" in key]
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.lm_head.weight, made.model.lm_head.weight)
    again = trainer(tmp_path, model=str(tmp_path / "out"))
    assert torch.equal(again.value_function.head.weight, made.value_function.head.weight)
    assert torch.equal(again.model.lm_head.weight, made.model.lm_head.weight)


def test_an_adapter_folder_is_a_model_too(tmp_path: Path) -> None:
    tiny_policy().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    made = trainer(tmp_path, model=base, peft_config=LoraConfig(**LORA))
    made.train()
    made.save_model(str(tmp_path / "out"))
    again = trainer(tmp_path, model=str(tmp_path / "out"))
    ids = torch.tensor([[0, 1, 2]])
    torch.testing.assert_close(again.model.eval()(ids).logits, made.model.eval()(ids).logits)
    assert torch.equal(again.value_function.head.weight, made.value_function.head.weight)
    assert any(p.requires_grad for name, p in again.model.named_parameters() if "lora" in name)


def test_the_best_checkpoint_comes_back_with_its_value_function(tmp_path: Path) -> None:
    paid = iter([5.0, 1.0])

    class Best(TrainerCallback):
        saved: torch.Tensor

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                self.saved = made.value_function.head.weight.detach().clone()

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        if len(completions) == 3:  # the evaluation
            return [next(paid)] * 3
        return [1 - ids[0] / EOS for ids in completion_ids]

    best = Best()
    made = trainer(
        tmp_path,
        reward_funcs=reward,
        peft_config=LoraConfig(**LORA),
        eval_dataset=prompts(3),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="reward",
        callbacks=[best],
    )
    made.train()
    assert made.state.best_metric == 5.0
    assert torch.equal(made.value_function.head.weight, best.saved)


def value_model(seed: int = 7) -> LlamaForSequenceClassification:
    set_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=17, num_labels=1, pad_token_id=EOS, **shape))


def test_a_value_model_of_its_own_gives_the_values_is_trained_and_is_kept(tmp_path: Path) -> None:
    model = value_model()
    made = trainer(tmp_path, peft_config=LoraConfig(**LORA), value_model=model, save_strategy="steps", save_steps=4)
    before = weights(model)
    done = made.rollouts.complete(["abc", "a"], True, (0,))
    _, values = made.rollouts.score(done)
    assert values is not None
    for row, n in enumerate(done.lengths.tolist()):
        prompt = int(done.prompt_lengths[row])
        hidden = model.model(done.ids[row : row + 1, : prompt + n])[0][0, prompt - 1 :]
        torch.testing.assert_close(values[row, : n + 1], model.score(hidden)[:, 0])
    made.train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "embed" not in name)
    assert len(keys(tmp_path / "checkpoint-4" / FILE)) == len(before)
    resumed = trainer(tmp_path, peft_config=LoraConfig(**LORA), value_model=value_model(8), max_steps=5)
    resumed.value_function.load(tmp_path / "checkpoint-4")
    for name, p in resumed.value_function.model.named_parameters():
        assert torch.equal(p, weights(model)[name])
    with pytest.raises(ValueError, match="another value function"):
        trainer(tmp_path, peft_config=LoraConfig(**LORA)).value_function.load(tmp_path / "checkpoint-4")


# ---- The reference


def test_without_an_adapter_the_reference_is_a_frozen_copy(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=8, num_ppo_epochs=1)
    before = weights(made.ref_model)
    made.train()
    kl = [entry["kl"] for entry in made.state.log_history if "kl" in entry]
    assert kl[0] == 0.0
    assert abs(kl[-1]) > 1e-3
    assert all(torch.equal(p, before[name]) for name, p in made.ref_model.named_parameters())
    assert trainer(tmp_path, kl_coef=0.0).ref_model is None


def test_an_explicit_reference_model_is_the_one_that_is_asked(tmp_path: Path) -> None:
    other = tiny_policy(seed=9)
    for adapter in ({}, {"peft_config": LoraConfig(**LORA)}):
        made = trainer(tmp_path, ref_model=other, **adapter)
        done = made.rollouts.complete(["abc", "a"], True, (0,))
        reference = made.rollouts.reference(done)
        assert reference is not None
        for row, n in enumerate(done.lengths.tolist()):
            prompt = int(done.prompt_lengths[row])
            ids = done.ids[row, : prompt + n]
            wanted = torch.log_softmax(other(ids[None]).logits[0], 1)[
                torch.arange(prompt - 1, prompt + n - 1), ids[prompt:]
            ]
            torch.testing.assert_close(reference[row, :n], wanted, rtol=1e-4, atol=1e-5)


def test_another_adapter_may_be_the_reference(tmp_path: Path) -> None:
    model = get_peft_model(tiny_policy(), LoraConfig(init_lora_weights=False, **LORA))
    model.add_adapter("sft", LoraConfig(init_lora_weights=False, **LORA))
    made = trainer(tmp_path, model=model, ref_adapter_name="sft")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    done = made.rollouts.complete(["abc", "a"], True, (0,))
    logprobs, reference = made.rollouts.score(done)[0], made.rollouts.reference(done)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert model.active_adapter == "default"
    model.set_adapter("sft")
    wanted = made.rollouts.score(done)[0]
    assert reference is not None
    torch.testing.assert_close(reference, wanted)
    assert not torch.allclose(logprobs, wanted)
    with pytest.raises(ValueError, match="ref_adapter_name='x' must be an adapter of the model"):
        trainer(tmp_path, model=get_peft_model(tiny_policy(), LoraConfig(**LORA)), ref_adapter_name="x")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_the_base_are_refused(tmp_path: Path, bias: str) -> None:
    with pytest.raises(ValueError, match=rf"LoraConfig\(bias='{bias}'\) trains biases"):
        trainer(tmp_path, peft_config=LoraConfig(bias=bias, **LORA))
    trainer(tmp_path, peft_config=LoraConfig(bias=bias, **LORA), ref_model=tiny_policy())
    trainer(tmp_path, peft_config=LoraConfig(bias=bias, **LORA), kl_coef=0.0)


def test_anything_else_that_is_trained_in_the_base_is_found_out(tmp_path: Path) -> None:
    model = get_peft_model(tiny_policy(), LoraConfig(**LORA))
    before = weights(model)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"adapter switched off the model still depends on what is trained"):
        trainer(tmp_path, model=model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- Evaluation


def test_evaluation_is_the_mean_reward_of_greedy_completions(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=prompts(5), per_device_eval_batch_size=2, max_completion_length=3)
    wanted = []
    for row in prompts(5):
        ids = tokenizer()(row["prompt"])["input_ids"]
        out = made.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=3, eos_token_id=EOS)[
            0, len(ids) :
        ]
        wanted.append(1 - out.float().mean() / EOS)
    found = made.evaluate()
    assert found["eval_reward"] == pytest.approx(float(torch.stack(wanted).mean()), abs=1e-6)
    assert found["eval_rewards/early_letters/mean"] == found["eval_reward"]
    assert made.evaluate()["eval_reward"] == found["eval_reward"]
    assert made.model.training is False or made.state.global_step == 0
    both = trainer(tmp_path, eval_dataset={"x": prompts(2), "y": prompts(3)}).evaluate()
    assert {"eval_x_reward", "eval_y_reward"} <= set(both)
    sampled = trainer(tmp_path, eval_dataset=prompts(5), eval_do_sample=True)
    assert sampled.evaluate()["eval_reward"] != found["eval_reward"]


def test_evaluation_leaves_training_as_it_is(tmp_path: Path) -> None:
    found = []
    for strategy in ("no", "steps"):
        made = trainer(
            tmp_path,
            peft_config=LoraConfig(**LORA),
            eval_dataset=prompts(3),
            eval_strategy=strategy,
            eval_steps=1,
            eval_do_sample=True,
        )
        made.train()
        found.append(weights(made.model))
    assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())


# ---- Logs


class Events(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            self.seen.append(name)
        return super().__getattribute__(name)


def test_callbacks_fire(tmp_path: Path) -> None:
    events = Events()
    trainer(
        tmp_path,
        callbacks=[events],
        max_steps=3,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=prompts(2),
        gradient_accumulation_steps=2,
    ).train()
    counted = {name: events.seen.count(name) for name in set(events.seen)}
    wanted = {"on_train_begin": 1, "on_train_end": 1, "on_epoch_begin": 1, "on_step_begin": 3, "on_step_end": 3}
    wanted |= {"on_substep_end": 3, "on_pre_optimizer_step": 3, "on_optimizer_step": 3, "on_log": 3 + 2 + 1}
    wanted |= {"on_save": 2, "on_evaluate": 2, "on_prediction_step": 2}
    assert {name: counted.get(name) for name in wanted} == wanted


def test_what_is_logged_of_a_rollout(tmp_path: Path) -> None:
    seen: list[list[list[int]]] = []

    def length(completion_ids: list[list[int]], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        seen.append(completion_ids)
        log_metric("longest", max(map(len, completion_ids)))
        log_extra("first", [ids[0] for ids in completion_ids])
        return [float(len(ids)) for ids in completion_ids]

    def starts_early(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [1.0 if ids[0] < 8 else None for ids in completion_ids]

    made = trainer(
        tmp_path,
        reward_funcs=[length, starts_early],
        reward_weights=[1.0, 10.0],
        per_device_train_batch_size=8,
        max_steps=2,
        num_ppo_epochs=1,
        logging_steps=2,
        log_completions=True,
        num_completions_to_print=2,
        peft_config=LoraConfig(init_lora_weights=False, **LORA),
    )
    made.train()
    (log,) = (entry for entry in made.state.log_history if "reward" in entry)
    lengths = torch.tensor([[float(len(ids)) for ids in batch] for batch in seen])
    early = torch.tensor([[float(ids[0] < 8) for ids in batch] for batch in seen])
    ended = torch.tensor([[float(ids[-1] == EOS) for ids in batch] for batch in seen])
    totals = lengths + 10 * early
    assert log["reward"] == pytest.approx(float(totals.mean()), rel=1e-6)
    assert log["reward_std"] == pytest.approx(float(totals.std(dim=1, unbiased=False).mean()), rel=1e-5)
    assert log["rewards/length/mean"] == pytest.approx(float(lengths.mean()), rel=1e-6)
    assert log["rewards/starts_early/mean"] == 1.0  # of those that have one
    assert log["completions/mean_length"] == pytest.approx(float(lengths.mean()), rel=1e-6)
    assert log["completions/max_length"] == pytest.approx(float(lengths.amax(1).mean()), rel=1e-6)
    assert log["completions/min_length"] == pytest.approx(float(lengths.amin(1).mean()), rel=1e-6)
    assert log["completions/ended_ratio"] == pytest.approx(float(ended.mean()), rel=1e-6)
    assert log["longest"] == log["completions/max_length"]
    assert 0 < log["entropy"] < 4
    assert log["kl"] > 0
    assert {"clip_ratio", "clip_ratio_value", "approx_kl", "value/mean", "kl_coef", "loss/policy"} <= set(log)

    table = Dataset.from_parquet(str(tmp_path / "completions/completions_00002.parquet"), cache_dir=str(tmp_path / "c"))
    assert len(table) == 16
    assert set(table.column_names) == {"step", "prompt", "completion", "length", "starts_early", "first", "advantage"}
    assert table["length"] == lengths.flatten().tolist()
    assert table["first"] == [ids[0] for batch in seen for ids in batch]


def test_entropy_and_explained_variance_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, kl_coef=0.0, per_device_train_batch_size=8)
    made.value_function.head.weight.data.copy_(torch.linspace(-1, 1, 32)[None])
    found = made.rollouts.make([{"prompt": "ab"[i % 2]} for i in range(8)], 0)
    log = made.metrics.take("train")
    mask = torch.arange(found["logprobs"].shape[1]) < found["lengths"][:, None]
    assert log["entropy"] == pytest.approx(-float(found["logprobs"][mask].mean()), rel=1e-5)
    residual = (found["returns"] - found["values"])[mask]
    wanted = 1 - residual.var(unbiased=False) / found["returns"][mask].var(unbiased=False)
    assert log["value/explained_variance"] == pytest.approx(float(wanted), rel=1e-4)


def test_config_from_text(tmp_path: Path) -> None:
    made = config(tmp_path, chat_template_kwargs='{"x": 1}', model_init_kwargs='{"dtype": "bfloat16"}')
    assert (made.chat_template_kwargs, made.model_init_kwargs) == ({"x": 1}, {"dtype": "bfloat16"})
