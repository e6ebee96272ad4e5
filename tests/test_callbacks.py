"""The ranks and exits of a model, measured while it is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from peft_dynamic import DyLoRAConfig
from peft_dynamic.callbacks import mean_loss
from peft_dynamic.trainers import ExitCurveCallback, RankCurveCallback, exit_at
from tests.tuners.common import tiny_llama

ROWS = [{"input_ids": [i, i + 1, i + 2, i + 3], "labels": [-100, i + 1, i + 2, i + 3]} for i in range(8)]
TARGETS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def trainer(folder: Path, config: Any = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = tiny_llama(64)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "max_steps": 3, **settings}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        learning_rate=5e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    adapted = get_peft_model(model, config) if config is not None else model
    return Trainer(adapted, arguments, train_dataset=ROWS, eval_dataset=ROWS[:6])


def logged(run: Trainer, name: str) -> list[float]:
    return [row[name] for row in run.state.log_history if name in row]


def batches(run: Trainer) -> list[dict[str, torch.Tensor]]:
    return [run.data_collator(ROWS[:6])]


@pytest.mark.parametrize("config", [LoraConfig(**TARGETS), DyLoRAConfig(ranks=[1, 2, 4], **TARGETS)])
@pytest.mark.parametrize("given", [False, True])
def test_each_evaluation_has_the_loss_at_the_ranks_and_the_training_is_not_changed(
    tmp_path: Path, config: Any, given: bool
) -> None:
    run, plain = trainer(tmp_path, config), trainer(tmp_path, config)
    run.add_callback(RankCurveCallback([2, 1], trainer=run if given else None))
    run.train()
    plain.train()
    for (name, ours), (_, theirs) in zip(run.model.named_parameters(), plain.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert logged(run, "eval_loss") == logged(plain, "eval_loss")
    for rank in (1, 2):
        found = logged(run, f"eval_rank_{rank}_loss")
        assert len(found) == 3
        import peft_dynamic

        with torch.no_grad(), peft_dynamic.at_rank(run.model, rank):
            assert found[-1] == pytest.approx(run.model.eval()(**batches(run)[0]).loss.item(), rel=1e-5)
    assert logged(run, "eval_rank_1_loss") != logged(run, "eval_rank_2_loss")
    assert set(run.callback_handler.callbacks[-1].points) == {1, 2}


def test_of_one_token_of_many_the_loss_counts_as_one() -> None:
    model = tiny_llama(64).eval()
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]},
        {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]},
    ]
    apart = [{name: torch.tensor([row[name]]) for name in row} for row in rows]
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in apart]
        found = mean_loss(model, apart)["loss"]
    assert found == pytest.approx((losses[0] + 3 * losses[1]) / 4, rel=1e-6)


def test_the_best_checkpoint_and_early_stopping_go_by_a_rank(tmp_path: Path) -> None:
    values = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "load_best_model_at_end": True}
    run = trainer(
        tmp_path, LoraConfig(**TARGETS), metric_for_best_model="eval_rank_1_loss", greater_is_better=False, **settings
    )
    run.add_callback(RankCurveCallback([1], evaluate=lambda model: {"loss": next(values)}))
    run.add_callback(EarlyStoppingCallback(2))
    run.train()
    assert run.state.global_step == 4
    assert run.state.best_metric == 2.0
    assert str(run.state.best_model_checkpoint).endswith("checkpoint-2")


def test_every_so_many_evaluations(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoraConfig(**TARGETS), max_steps=5)
    run.add_callback(RankCurveCallback([1], every=2, trainer=run))
    run.train()
    steps = [row["step"] for row in run.state.log_history if "eval_rank_1_loss" in row]
    assert steps == [1, 3, 5]


def test_exits_of_any_trainer(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.add_callback(ExitCurveCallback([1], trainer=run))
    run.train()
    with torch.no_grad(), exit_at(run.model.eval(), 1):
        alone = run.model(**batches(run)[0]).loss.item()
    assert logged(run, "eval_exit_1_loss")[-1] == pytest.approx(alone, rel=1e-5)


def test_several_data_sets_keep_their_names(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoraConfig(**TARGETS), max_steps=2)
    run.eval_dataset = {"a": ROWS[:2], "b": ROWS[2:6]}
    run.add_callback(RankCurveCallback([1], every=2, trainer=run))
    run.train()
    assert len(logged(run, "eval_a_rank_1_loss")) == len(logged(run, "eval_b_rank_1_loss")) == 1
    assert logged(run, "eval_a_rank_1_loss") != logged(run, "eval_b_rank_1_loss")


@pytest.mark.parametrize("ranks", [[], [0], [1.5], "2,8", [True]])
def test_what_is_no_list_of_ranks_is_refused(ranks: Any) -> None:
    with pytest.raises(ValueError, match=r"ranks=.*must be a list of whole numbers above 0"):
        RankCurveCallback(ranks)
    with pytest.raises(ValueError, match=r"exits=.*must be a list of whole numbers above 0"):
        ExitCurveCallback(ranks)


def test_what_the_model_cannot_do_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every=0"):
        RankCurveCallback([1], every=0)
    run = trainer(tmp_path, LoraConfig(**TARGETS))
    run.add_callback(RankCurveCallback([8]))
    with pytest.raises(ValueError, match="8"):
        run.train()
    assert run.state.global_step == 0
    bare = trainer(tmp_path)
    bare.add_callback(RankCurveCallback([1]))
    with pytest.raises(ValueError, match="adapter"):
        bare.train()
    deep = trainer(tmp_path)
    deep.add_callback(ExitCurveCallback([99]))
    with pytest.raises(ValueError, match="99"):
        deep.train()


def test_loggers_without_the_trainer_are_told_of(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = trainer(tmp_path, LoraConfig(**TARGETS))
    run.args.report_to = ["tensorboard"]
    run.add_callback(RankCurveCallback([1]))
    with pytest.warns(UserWarning, match=r"reaches .* but not tensorboard\. Add it as trainer\.add_callback"):
        run.train()
