"""An interruption that no hook is told of leaves nothing behind."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_dynamic import ActivationDensityLoss, DensityLoRAConfig, DyLoRAConfig
from peft_dynamic.hosts.running import call_frame, is_running
from tests.tuners.common import RankRecorder, adapted, rows, schedule_of, tiny_llama, train

INTERRUPTIONS = [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, RuntimeError]


def interrupt(module: nn.Module, error: type[BaseException], call: Callable[[], Any]) -> None:
    """Run `call`, which ends by this error inside the module."""

    def fail(*args: Any) -> None:
        raise error

    handle = module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(error):
            call()
    finally:
        handle.remove()


def test_torch_tells_hooks_of_exceptions_alone() -> None:
    """The fact that `running` is there for: when it no longer holds, `always_call` will do."""
    told = []
    module = nn.Sequential(nn.Linear(2, 2))
    module.register_forward_hook(lambda *_: told.append(1), always_call=True)
    interrupt(module[0], RuntimeError, lambda: module(torch.ones(1, 2)))
    assert told == [1]
    interrupt(module[0], KeyboardInterrupt, lambda: module(torch.ones(1, 2)))
    assert told == [1]


def test_a_call_runs_until_it_returns() -> None:
    seen: list[Any] = []
    module = nn.Sequential(nn.Linear(2, 2))
    module.register_forward_pre_hook(lambda *_: seen.append(call_frame()))
    module[0].register_forward_hook(lambda *_: seen.append(is_running(seen[0])))
    module(torch.ones(1, 2))
    assert (seen[1], is_running(seen[0])) == (True, False)
    with pytest.raises(RuntimeError, match="outside of a module's hooks"):
        call_frame()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("error", INTERRUPTIONS)
def test_training_draws_its_ranks_after_an_interrupted_evaluation(
    error: type[BaseException], context: Any, mode: str
) -> None:
    expected = RankRecorder(model := adapted())
    train(model, 8)
    model = adapted()
    found = RankRecorder(model)
    getattr(model, mode)()

    def evaluate() -> None:
        with context():
            model(input_ids=rows(2))

    def generate() -> None:
        model.generate(input_ids=rows(2), max_new_tokens=3, do_sample=False)

    deep = model.base_model.model.model.layers[1].mlp
    for call in (evaluate, generate, evaluate):
        interrupt(deep, error, call)
    found.training.clear()
    train(model, 8)
    assert found.training == expected.training
    assert len(set(found.training)) > 1
    assert not schedule_of(model).suspended


@pytest.mark.parametrize("error", INTERRUPTIONS)
def test_a_rollout_in_train_mode_after_an_interruption_is_at_the_set_rank(error: type[BaseException]) -> None:
    model = adapted()
    model.set_rank(2)
    model.train()
    interrupt(model.base_model.model.model.layers[1].mlp, error, lambda: model(input_ids=rows(2)))
    recorder = RankRecorder(model)
    model.generate(input_ids=rows(2), max_new_tokens=2, do_sample=False)
    assert set(recorder.training) == {2}


@pytest.mark.parametrize("error", INTERRUPTIONS)
def test_an_interrupted_backward_pass_with_checkpointing_goes_on_at_its_rank(error: type[BaseException]) -> None:
    """Checkpointing runs the layers again outside of the model's own call, where only an interruption is left over."""
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    recorder = RankRecorder(model)
    optimizer = train(model, 3)
    loss = model(input_ids=rows(2), labels=rows(2)).loss
    drawn = recorder.training[-1]

    def evaluate() -> None:
        with torch.no_grad():
            model(input_ids=rows(2))

    interrupt(model.base_model.model.model.layers[1].mlp, error, evaluate)
    recorder.training.clear()
    loss.backward()
    assert recorder.training == [drawn]
    optimizer.step()


@pytest.mark.parametrize("error", INTERRUPTIONS)
def test_a_density_loss_forgets_an_interrupted_pass(error: type[BaseException]) -> None:
    def made() -> tuple[Any, Any]:
        model = get_peft_model(tiny_llama(), DyLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        return model.train(), ActivationDensityLoss(weight=1.0, eps=1e-2).attach(model)

    model, density = made()
    expected = float(model(input_ids=rows(2), labels=rows(2)).loss.detach())
    value = float(density.value)
    model, density = made()
    interrupt(model.base_model.model.model.layers[1].mlp.down_proj, error, lambda: model(input_ids=rows(4, seed=9)))
    assert float(model(input_ids=rows(2), labels=rows(2)).loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert float(density.value) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("error", INTERRUPTIONS)
def test_a_density_adapter_forgets_an_interrupted_pass(error: type[BaseException]) -> None:
    def made() -> Any:
        config = DensityLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", density_eps=1e-2)
        return get_peft_model(tiny_llama(), config).train()

    expected = float(made()(input_ids=rows(2), labels=rows(2)).loss.detach())
    model = made()
    interrupt(model.base_model.model.model.layers[1].mlp.down_proj, error, lambda: model(input_ids=rows(4, seed=9)))
    assert float(model(input_ids=rows(2), labels=rows(2)).loss.detach()) == pytest.approx(expected, rel=1e-6)
